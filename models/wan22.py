"""Wan2.2's transformer as diffusers ships it: its spec, and how it is built and captured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lltk.graph.capture import capture
from lltk.graph.contract import Role, TensorSpec
from lltk.graph.geometry import Geometry, Kind
from lltk.graph.loading import LOADING
from lltk.graph.program import Program
from lltk.graph.recipe import ModelSection, Recipe
from lltk.graph.spec import LinearRole, ModelSpec
from lltk.graph.verify import verify
from lltk.models.checkpoint import Checkpoint, load_checkpoint
from lltk.models.configs import CONFIGS, validate_config
from lltk.models.family import Family

STRIDE = (4, 16, 16)
"""Video (frames, height, width) of one latent of Wan2.2's VAE."""

LINEARS = {
    LinearRole.SELF_QUERY: "blocks.{layer}.attn1.to_q",
    LinearRole.SELF_KEY: "blocks.{layer}.attn1.to_k",
    LinearRole.SELF_VALUE: "blocks.{layer}.attn1.to_v",
    LinearRole.SELF_QKV: "blocks.{layer}.attn1.to_qkv",
    LinearRole.SELF_OUT: "blocks.{layer}.attn1.to_out.0",
    LinearRole.CROSS_QUERY: "blocks.{layer}.attn2.to_q",
    LinearRole.CROSS_KEY: "blocks.{layer}.attn2.to_k",
    LinearRole.CROSS_VALUE: "blocks.{layer}.attn2.to_v",
    LinearRole.CROSS_OUT: "blocks.{layer}.attn2.to_out.0",
    LinearRole.UP: "blocks.{layer}.ffn.net.0.proj",
    LinearRole.DOWN: "blocks.{layer}.ffn.net.2",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a WanTransformer3DModel configuration."""
    with LOADING:
        from diffusers import WanTransformer3DModel

    return ModelSpec(
        layers=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        channels=config["in_channels"],
        text_dim=config["text_dim"],
        patch=tuple(config["patch_size"]),
        stride=STRIDE,
        block="blocks.{layer}",
        self_attention="blocks.{layer}.attn1",
        cross_attention="blocks.{layer}.attn2",
        linears=LINEARS,
        rope="rope",
        rope_tables=("rope.freqs_cos", "rope.freqs_sin"),
        rope_theta=10000.0,
        rope_split=rope_split(config["attention_head_dim"]),
        output="sample",
        keep_fp32=tuple(WanTransformer3DModel._keep_in_fp32_modules),
    )


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's channels turn by time, height and width, as in WanRotaryPosEmbed."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model, initialised as diffusers does."""
    with LOADING:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(**config)


def captured(
    config: Mapping[str, Any], kind: Kind, geometry: Geometry, dtype: torch.dtype
) -> Program:
    """Capture the model at a geometry, without allocating its weights.

    Args:
        config: of WanTransformer3DModel.
        kind: decides how many frames the captured forward holds.
        geometry: sizes.
        dtype: compute dtype; the modules that diffusers keeps in float32 stay there.

    Returns:
        A captured Program. It has the graph ``forward``, meta weights in the configuration's
        dtypes, and the rotary tables as constants.

    Raises:
        ValueError: a size is beyond the rotary tables.
    """
    model_spec = spec(config)
    _check_rope(config, kind, geometry)
    with LOADING:
        from diffusers.models.attention_dispatch import attention_backend

    frames = geometry.captured_frames(kind)
    tokens = frames * geometry.frame_tokens(model_spec)
    program = Program(kind, model_spec, geometry, dtype, graphs={}, weights={})

    def run_dtype(name: str, parameter: Tensor) -> torch.dtype:
        program.weights[name] = parameter
        return program.run_dtype(name)

    with LOADING, attention_backend("native"):
        graph, weights, buffers = capture(
            lambda: build(config),
            inputs={
                "hidden_states": TensorSpec(
                    (geometry.batch, model_spec.channels, frames, *geometry.latent(model_spec)),
                    dtype,
                    Role.LATENTS,
                ),
                "timestep": TensorSpec((geometry.batch, tokens), torch.float32, Role.TIME),
                "encoder_hidden_states": TensorSpec(
                    (geometry.batch, geometry.text_tokens, model_spec.text_dim), dtype, Role.TEXT
                ),
            },
            outputs=[model_spec.output],
            run_dtype=run_dtype,
            options={"return_dict": False},
        )
    tables = _rope_tables(config, model_spec)
    program.graphs = {"forward": graph}
    program.weights = weights
    program.constants = {name: tables[name] for name in buffers}
    verify(program)
    return program


def _check_rope(config: Mapping[str, Any], kind: Kind, geometry: Geometry) -> None:
    """Refuse sizes along which diffusers' rotary tables have too few places."""
    model_spec, most = spec(config), config.get("rope_max_seq_len", 1024)
    down, across = geometry.grid(model_spec)
    time = "chunk" if kind == "stream" else "frames"
    frames = geometry.captured_frames(kind) // model_spec.patch[0]
    for name, places in (("height", down), ("width", across), (time, frames)):
        if places > most:
            size = getattr(geometry, name)
            raise ValueError(
                f"geometry.{name}: {size} takes {places} places of the model's RoPE table, which "
                f"has {most} (rope_max_seq_len); {size * most // places} fit"
            )


def _rope_tables(config: Mapping[str, Any], model_spec: ModelSpec) -> dict[str, Tensor]:
    """diffusers' rotary tables, which no checkpoint holds."""
    with LOADING:
        from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    rope = WanRotaryPosEmbed(
        model_spec.head_dim, model_spec.patch, config.get("rope_max_seq_len", 1024)
    )
    return {f"{model_spec.rope}.{name}": table for name, table in rope.named_buffers()}


def _load(section: ModelSection) -> Checkpoint:
    return load_checkpoint(str(section.checkpoint), ema=section.ema)


def _capture(config: Mapping[str, Any], recipe: Recipe) -> Program:
    dtype = getattr(torch, recipe.model.dtype)
    return captured(config, recipe.program, recipe.geometry, dtype)


FAMILY = Family(
    name="transformer",
    kinds=("train", "score", "stream", "reference"),
    options=frozenset({"ema", "lora"}),
    configs=CONFIGS,
    validate=validate_config,
    load=_load,
    build=build,
    capture=_capture,
)
