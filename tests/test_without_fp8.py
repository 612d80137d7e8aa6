"""The recipe for GPUs that have no FP8, such as A100s."""

from __future__ import annotations

import pytest
import torch
from compiling import compiling_for
from helpers import refused
from ranks import alike

from lltk.compiler import transform, with_weights
from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.models.configs import named_config
from lltk.ops import hardware
from lltk.ops.implementations import check_device, find_implementation
from lltk.stream.rollout import Rollout

pytestmark = pytest.mark.cpu

RECIPE = "wan22_5b_stream_nvfp4_cache_sp2"
KERNELS = {
    "row_pipeline": {"_write"},
    "rms_norm_rope": {"_norm_rope"},
    "nvfp4_quantise": {"_largest", "_quantise"},
    "nvfp4_dequantise": {"_dequantise"},
    "fp8_dequantise": {"_dequantise"},
    "nvfp4_write_page": {"_sums", "_largest", "_write"},
    "nvfp4_paged_attention": {"decode_kernel"},
}
"""What each of the recipe's implementations launches."""
SHARED = 163 * 1024
"""Bytes of shared memory that a program may have on an A100."""


def program(recipe: str, *changes: str) -> Program:
    """A layer of the 5B model, at true widths."""
    made = open_recipe(recipe, ("geometry.height=64", "geometry.width=96", *changes))
    config = named_config("wan22_5b") | {"num_layers": 1}
    model = made.model.model_copy(update={"config": config})
    return transform(made.model_copy(update={"model": model}), weights=False)


@torch.no_grad()
def test_all_kernels_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a pass and a commit launch, over a page. None needs an instruction for FP8."""
    pytest.importorskip("triton")
    made = program(RECIPE)
    assert made.implementations.keys() == KERNELS.keys()
    monkeypatch.setattr("lltk.graph.module.check_device", lambda *given: None)
    zeros = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in made.weights.items()}
    module, geometry, spec = instantiate(with_weights(made, zeros)), made.geometry, made.spec
    latents = torch.zeros(1, spec.channels, geometry.chunk, *geometry.latent(spec)).bfloat16()
    positions = torch.arange(geometry.chunk, dtype=torch.float64)
    with alike(), compiling_for(80) as found:
        run = Rollout(made, module)
        run.set_text(torch.zeros(1, geometry.text_tokens, spec.text_dim).bfloat16())
        run.commit(latents, positions)
        run.step(latents, torch.zeros(1, geometry.chunk), positions)
    assert found.keys() == set().union(*KERNELS.values())
    for kernel in (each for compiled in found.values() for each in compiled):
        assert ".target sm_80" in kernel.asm["ptx"] and "e4m3x2" not in kernel.asm["ptx"]
        assert kernel.metadata.shared <= SHARED


def test_what_needs_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "find_spec", lambda module: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    here = torch.device("cuda")
    check_device(program(RECIPE).implementations, here)
    message = refused(check_device, program("wan22_5b_stream_sp2").implementations, here)
    assert "not on sm_80" in message
    assert find_implementation("fp8_matmul", "scaled_mm").missing(here)
