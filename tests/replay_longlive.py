"""Replay recorded runs of LongLive-2.0's own code: its model, its assembly of clips,
its error recycling and its distillation.

    python tests/replay_longlive.py FILE…

Prints, for each file, the largest difference relative to the output's scale, or the share of what
was recorded that differs; exits 0 only if every file is within 2e-5, or 1e-4 for distillation.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from replay_data import replay_data
from replay_dmd import replay_dmd
from replay_errors import replay_errors
from replay_sp import replay_sp
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import pad

from lltk.compiler import transform, with_weights
from lltk.graph.module import ProgramModule, instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import Recipe, parse_recipe
from lltk.models.layouts import WEIGHT_LAYOUTS
from lltk.models.wan22 import STRIDE
from lltk.stream.rollout import Rollout

BOUND = 2e-5
DMD_BOUND = 1e-4
"""What the recorded gradients agree to with another implementation, in float64, is 4e-5."""
PASSES: dict[str, list[str]] = {
    "stream": ["hoist_text", "cached_step", "commit"],
    "train": ["text_per_chunk", "teacher_forcing"],
    "score": ["text_per_chunk", "block_causal"],
}


def recipe(meta: dict[str, Any], kind: str, lora: bool = False) -> Recipe:
    """The recipe of a recorded run."""
    chunk, frames = meta["frames_per_chunk"], meta.get("frames")
    window, sink = meta.get("window_frames", frames), meta.get("sink_frames", 0)
    shared = [{"balanced_sp": {"size": meta["ranks"]}}] if "ranks" in meta else []
    if lora:
        shared.append({"lora": {"rank": meta["lora_rank"], "alpha": float(meta["lora_alpha"])}})
    height, width = meta["latent"]
    return parse_recipe(
        {
            "program": kind,
            "model": {
                "dtype": "float32",
                "config": {
                    "patch_size": meta["patch"],
                    "num_attention_heads": meta["num_heads"],
                    "attention_head_dim": meta["dim"] // meta["num_heads"],
                    "in_channels": meta["channels"],
                    "out_channels": meta["channels"],
                    "text_dim": meta["text_dim"],
                    "freq_dim": meta["freq_dim"],
                    "ffn_dim": meta["ffn_dim"],
                    "num_layers": meta["num_layers"],
                },
            },
            "geometry": {
                "height": height * STRIDE[1],
                "width": width * STRIDE[2],
                "batch": meta.get("batch", 1),
                "chunk": chunk,
                "window": window,
                "sink": sink,
                "shot_sink": bool(meta.get("cuts")),
                "frames": frames or window,
                "text_tokens": meta["text_len"],
            },
            "passes": [
                "canonicalise",
                "per_frame_timesteps",
                "frame_positions",
                *PASSES[kind],
                *shared,
                "regionalise",
                "lower",
            ],
        },
        "recorded run",
    )


def compile_run(
    meta: dict[str, Any], weights: dict[str, Tensor], device: str
) -> tuple[Program, ProgramModule]:
    """The recorded model as a runnable Program."""
    program = transform(recipe(meta, "train" if "frames" in meta else "stream"), weights=False)
    names = WEIGHT_LAYOUTS["wan"].read(weights, "weights")
    program = with_weights(program, {names[key]: value for key, value in weights.items()})
    return program, instantiate(program, device)


def compile_network(
    meta: dict[str, Any], kind: str, lora: bool, weights: dict[str, Tensor]
) -> Program:
    """One of the networks of a recorded distillation, with its weights under lltk's names."""
    return with_weights(transform(recipe(meta, kind, lora), weights=False), weights)


def padded(text: Tensor, tokens: int) -> Tensor:
    """Zero rows up to the text length; they are attended without a mask."""
    return pad(text, (0, 0, 0, tokens - text.shape[-2]))


def replay_rollout(meta: dict[str, Any], data: dict[str, Tensor], rollout: Rollout) -> float:
    """Worst relative difference over every pass of a chunk-by-chunk run."""
    names = (re.fullmatch(r"chunk(\d+)\.step(\d+)\.x", key) for key in data)
    passes = sorted((int(name[1]), int(name[2])) for name in names if name)
    worst, shot = 0.0, 0
    for chunk in sorted({chunk for chunk, _ in passes}):
        shot += chunk in meta["cuts"]
        frames = torch.arange(meta["frames_per_chunk"], dtype=torch.float64)
        positions = frames + chunk * meta["frames_per_chunk"] + meta["phi"] * shot
        text = padded(data[f"chunk{chunk}.text"], meta["text_len"])[None]
        positions = positions.to(text.device)
        rollout.set_text(text)
        for name in (f"chunk{c}.step{step}" for c, step in passes if c == chunk):
            x, t, flow = (data[f"{name}.{part}"] for part in ("x", "t", "flow"))
            worst = max(worst, difference(rollout.step(x, t, positions), flow))
        assert not t.any(), f"{name}: the last pass of a chunk is the clean one"
        rollout.commit(x, positions, opens_shot=chunk in meta["cuts"])
    return worst


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the recorded output's largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def replay(path: Path, device: str = "cpu") -> float:
    """Worst relative difference of one file."""
    if path.suffix == ".json":
        return replay_data(path)
    with safe_open(path, "pt", device=device) as file:
        meta = json.loads(file.metadata()["meta"])
        data = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if "ranks" in meta:
        return replay_sp(recipe(meta, "train"), meta, path)
    if "error_recycling" in meta:
        return replay_errors(meta, data)
    if "loss" in meta:
        with torch.enable_grad():
            return replay_dmd(meta, data, path, partial(compile_network, meta))
    weights = {
        key.removeprefix("weights."): data.pop(key)
        for key in list(data)
        if key.startswith("weights.")
    }
    program, module = compile_run(meta, weights, device)
    if program.kind == "stream":
        return replay_rollout(meta, data, Rollout(program, module))
    result = module(
        "train",
        {
            "clean": data["clean"],
            "noisy": data["noisy"],
            "timestep": data["t"],
            "positions": torch.arange(meta["frames"], dtype=torch.float64, device=device),
            "encoder_hidden_states": padded(data["text"], meta["text_len"])[None],
        },
    )
    return difference(result["sample"], data["flow"])


def bound(path: Path) -> float:
    """How far off a file may be."""
    if path.suffix == ".json":
        return BOUND
    with safe_open(path, "pt") as file:
        return DMD_BOUND if "loss" in json.loads(file.metadata()["meta"]) else BOUND


def main(paths: list[str]) -> int:
    """Replay every file and say how far each is off."""
    if not paths:
        print(__doc__)
        return 2
    absent = [path for path in paths if not Path(path).is_file()]
    if absent:
        print(f"no such file: {', '.join(absent)}")
        return 2
    worst = {path: replay(Path(path)) for path in paths}
    for path, value in worst.items():
        verdict = "ok" if value <= bound(Path(path)) else "TOO FAR"
        print(f"{path}: off by {value:.2e} ({verdict})")
    return 0 if all(value <= bound(Path(path)) for path, value in worst.items()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
