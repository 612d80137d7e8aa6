"""fp8_cache: pages in E4M3."""

from __future__ import annotations

import pytest
import torch
from helpers import PASSES, make_program, make_recipe, refused, tiny_config
from test_gpu import rollout

from lltk.graph.module import instantiate
from lltk.graph.program import Program
from lltk.ops.floats import to_e4m3
from lltk.ops.paged_attention.reference import paged_attention
from lltk.ops.write_page.reference import write_page
from lltk.stream.rollout import Rollout

pytestmark = pytest.mark.cpu

STEPS = PASSES["stream"][:-2]
SIZES = {"height": 64, "width": 64, "chunk": 2, "window": 8, "sink": 2}


def streaming(*extra: str, attention: str = "reference") -> Program:
    steps = [*STEPS, *extra, "regionalise", {"lower": {"paged_attention": attention}}]
    config = tiny_config(2, num_attention_heads=2, attention_head_dim=16)
    return make_program(make_recipe("stream", steps, config=config, **SIZES))


def test_every_page_is_e4m3() -> None:
    program, plain = streaming("fp8_cache"), streaming()
    assert {spec.dtype for spec in program.pages.values()} == {torch.float8_e4m3fn}
    assert {n: s.shape for n, s in program.pages.items()} == {
        n: s.shape for n, s in plain.pages.items()
    }
    assert program.log[-3].matches == {"pages": 2 * 2 * 2}, "keys and values, layers, graphs"
    assert program.weights.keys() == plain.weights.keys()


@pytest.mark.parametrize("attention", ["reference", "sdpa", "arena"])
def test_a_stream_is_the_plain_one_over_rounded_pages(attention: str) -> None:
    """The first chunk reads no page; later ones read rounded keys and values."""
    wanted = rollout(streaming(), "cpu")
    ours = rollout(streaming("fp8_cache", attention=attention), "cpu")
    error = (ours - wanted).flatten(1).std(1) / wanted.flatten(1).std(1)
    assert error[0] < 1e-5 and (error[1:] > 1e-4).all() and (error < 0.05).all()


def test_pages_are_rounded_once() -> None:
    value = torch.randn(1, 4, 2, 16)
    pages = torch.zeros(1, 3, 4, 2, 16, dtype=torch.float8_e4m3fn)
    write_page(pages, value, torch.tensor([2]))
    rounded = to_e4m3(value).float()
    ours = paged_attention(value, value, value, pages, pages, torch.tensor([2]))
    exact = paged_attention(value, value, value, *[rounded[:, None]] * 2, torch.tensor([0]))
    assert torch.equal(ours, exact)
    plain = paged_attention(value, value, value, *[value[:, None]] * 2, torch.tensor([0]))
    assert not torch.equal(ours, plain)


def test_a_state_goes_on_bit_for_bit() -> None:
    program = streaming("fp8_cache", attention="arena")
    runs = [Rollout(program, instantiate(program)) for _ in range(2)]
    geometry, spec = program.geometry, program.spec
    latents = torch.randn(1, spec.channels, geometry.chunk, *geometry.latent(spec))
    positions = torch.arange(geometry.chunk, dtype=torch.float64)
    level = torch.full((1, geometry.chunk), 500.0)
    text = torch.randn(1, geometry.text_tokens, spec.text_dim)
    with torch.no_grad():
        for run in runs:
            run.set_text(text)
        for _ in range(2):
            runs[0].commit(latents, positions)
        runs[1]._runtime.restore({n: p.clone() for n, p in runs[0].pages.items()})
        runs[1].table.restore(runs[0].table.state)
        one, other = (run.step(latents, level, positions) for run in runs)
    assert torch.equal(one, other)


def test_a_cache_in_nvfp4_is_not_for_it() -> None:
    def make(*passes: str) -> Program:
        config = tiny_config(2, num_attention_heads=2, attention_head_dim=16)
        return make_program(make_recipe("stream", [*STEPS, *passes], config=config, **SIZES))

    assert "fp8_cache" in refused(make, "nvfp4_cache", "fp8_cache")
