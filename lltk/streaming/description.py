"""A plan in words."""

from __future__ import annotations

import torch

from lltk.export.facts import DECODER, TRANSFORMER
from lltk.graph.memory import readable
from lltk.graph.program import Program
from lltk.graph.text import dtype_name
from lltk.stream.positions import largest_position
from lltk.streaming.bundle import BundlePlan
from lltk.streaming.memory import text_bytes
from lltk.streaming.plan import Plan, StreamPlan
from lltk.streaming.traffic import pcie_seconds, sent_bytes


def describe(plan: Plan) -> dict[str, str]:
    """What runs where, by part, for people to read."""
    section, geometry = plan.section, plan.geometry
    guided = f", guidance {section.guidance:g}" if plan.guided else ""
    text = text_bytes(plan)
    assert isinstance(plan, BundlePlan | StreamPlan)
    models = _graphs(plan) if isinstance(plan, BundlePlan) else _programs(plan)
    if isinstance(plan, StreamPlan) and plan.transformer.turns_pages:
        largest = largest_position(geometry, section.shot_offset)
        counted = f"counted within the window, up to {largest:g} latent frames"
    else:
        counted = "absolute"
    return {
        "pipeline": section.pipeline,
        **models,
        "text encoder": f"{plan.text_device}, {section.text.after} after use"
        + ("" if text else "; its memory is not known without the pipeline's files"),
        "sampler": f"{section.steps} steps and a commit, shift {section.shift:g}{guided}",
        "video": f"{geometry.width}×{geometry.height} at {section.fps:g} fps",
        **({"ranks": _ranks(plan)} if isinstance(plan, StreamPlan) and plan.ranks > 1 else {}),
        "cache": f"{geometry.window} latent frames in pages of {geometry.chunk}, "
        f"sinks of {geometry.sink}{' (global and shot)' if geometry.shot_sink else ''}",
        "positions": counted,
    }


def _graphs(plan: BundlePlan) -> dict[str, str]:
    """A bundle's models."""
    by = f"ONNX Runtime's {plan.provider}"
    if engines := plan.facts.engines:
        by = f"engines of TensorRT for RTX {engines.version}"
    how = f"{plan.device}, {by}"
    stages = {TRANSFORMER: plan.dtype, DECODER: plan.video_dtype}
    return {
        "bundle": str(plan.path),
        **{name: f"{how}, {dtype_name(dtype)}" for name, dtype in stages.items()},
    }


def _programs(plan: StreamPlan) -> dict[str, str]:
    """The models that torch runs."""
    section, program = plan.section, plan.transformer
    choices = ", ".join(f"{op} {name}" for op, name in program.implementations.items())
    ways = {"blocks compiled": section.compile, "CUDA graphs": section.cuda_graphs}
    how = "".join(f"{way}, " for way, used in ways.items() if used)
    adapters = [f"{file} × {strength:g}" for file, strength in plan.recipe.model.adapters()]
    return {
        "transformer": f"{_where(plan.device, program)}, {how}{choices}",
        **({"adapters": ", ".join(adapters)} if adapters else {}),
        "decoder": f"{' and '.join(_where(d.device, d.program) for d in plan.decoders)}, "
        f"{'compiled, ' if section.decoder.compile else ''}"
        f"{'CUDA graphs, ' if section.decoder.cuda_graphs else ''}"
        f"passes {', '.join(entry.name for entry in plan.decoders[0].program.log)}",
    }


def _ranks(plan: StreamPlan) -> str:
    sent = sent_bytes(plan.transformer)
    return (
        f"{plan.ranks}, each of which sends {readable(sent)} in a denoising pass; a model of "
        f"PCIe Gen4 x16 has that take {pcie_seconds(sent) * 1e3:.1f} ms"
    )


def _where(device: torch.device, program: Program) -> str:
    return f"{device}, {str(program.dtype).removeprefix('torch.')}"
