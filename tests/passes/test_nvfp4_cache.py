"""nvfp4_cache: pages are quantised where they are committed and decoded where they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    PASSES,
    after,
    difference,
    hand_made,
    inputs,
    reached,
    refused,
    run,
    same,
    text,
)
from nvfp4_pages import by_hand, written
from torch import Tensor

from lltk.compiler import transform
from lltk.graph.contract import Role
from lltk.graph.edit import calls, inputs_of
from lltk.graph.memory import activations, estimate
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.graph.stages import Stage
from lltk.graph.verify import verify
from lltk.models.configs import named_config
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_paged_attention.reference import Pages

NVFP4_PAGED_ATTENTION = overload("nvfp4_paged_attention")

pytestmark = pytest.mark.cpu

ARENAS = "k_pages_0: pages(f32[1, 4, 8, 2, 16]), v_pages_0: pages(f32[1, 4, 8, 2, 16])"
BEFORE = {
    "prologue": """
    def prologue(encoder_hidden_states: text(f32[1, 8, 2, 16])):
        # root
        neg: f32[1, 8, 2, 16] = aten.neg.default(encoder_hidden_states)
        return {'cross_k_0': neg}
    """,
    "step": f"""
    def step(q: f32[1, 8, 2, 16], table: table(i64[3]), {ARENAS}):
        # blocks.0.attn1
        attend: f32[1, 8, 2, 16] = \
lltk.paged_attention.default(q, q, q, k_pages_0, v_pages_0, table)
        return {{'sample': attend}}
    """,
    "commit": f"""
    def commit(q: f32[1, 8, 2, 16], {ARENAS}, slot: slot(i64[1])):
        # blocks.0.attn1
        write: None = lltk.write_page.default(k_pages_0, q, slot)
        write_1: None = lltk.write_page.default(v_pages_0, q, slot)
        return {{}}
    """,
}
K_PARTS = """\
k_pages_codes_0: page_codes(u8[1, 4, 8, 2, 8]), \
k_pages_scales_0: page_scales(f8e4m3[1, 4, 8, 2, 1]), \
k_pages_decode_scales_0: page_decode_scales(f32[1, 4, 2]), \
k_pages_means_0: page_means(bf16[1, 4, 2, 16])"""
V_PARTS = K_PARTS.replace("k_", "v_")
STEP = f"""
def step(q: f32[1, 8, 2, 16], table: table(i64[3]), {K_PARTS}, {V_PARTS}):
    # blocks.0.attn1
    nvfp4_paged_attention: f32[1, 8, 2, 16] = lltk.nvfp4_paged_attention.default(q, q, q, \
k_pages_codes_0, k_pages_scales_0, k_pages_decode_scales_0, k_pages_means_0, \
v_pages_codes_0, v_pages_scales_0, v_pages_decode_scales_0, v_pages_means_0, table)
    return {{'sample': nvfp4_paged_attention}}
"""
COMMIT = f"""
def commit(q: f32[1, 8, 2, 16], slot: slot(i64[1]), {K_PARTS}, {V_PARTS}):
    # blocks.0.attn1
    nvfp4_write_page: None = lltk.nvfp4_write_page.default(k_pages_codes_0, k_pages_scales_0, \
k_pages_decode_scales_0, k_pages_means_0, q, slot, 'mse')
    nvfp4_write_page_1: None = lltk.nvfp4_write_page.default(v_pages_codes_0, v_pages_scales_0, \
v_pages_decode_scales_0, v_pages_means_0, q, slot, 'mse')
    return {{}}
"""
STEPS = PASSES["stream"][:6]
LOWERED = (*STEPS, "nvfp4_cache", "regionalise", "lower")


def made() -> Program:
    return hand_made("stream", Stage.CAUSAL, BEFORE)


def quantised(*steps: str, **options: Any) -> Program:
    before = reached("stream", *STEPS, head_dim=16)
    return after(before, {"nvfp4_cache": options}, *steps)


def test_rewrites_the_text() -> None:
    program = after(made(), "nvfp4_cache")
    assert text(program, "step") == STEP.strip()
    assert text(program, "commit") == COMMIT.strip()
    assert text(program, "prologue") == text(made(), "prologue")
    assert program.stage == Stage.QUANTISED


def test_the_rule_and_the_smoothing_are_the_recipes() -> None:
    program = after(made(), {"nvfp4_cache": {"smoothing": False, "rule": "none"}})
    assert not any("means" in name for name in program.pages)
    assert "v_pages_decode_scales_0, None, table)" in text(program, "step")
    assert "k_pages_decode_scales_0, None, q, slot, 'none')" in text(program, "commit")
    assert "nvfp4_cache: rule: " in refused(after, made(), {"nvfp4_cache": {"rule": "mes"}})


@pytest.mark.parametrize("layers", [1, 2])
def test_matches_follow_from_the_layers(layers: int) -> None:
    """The commit's last block ends at its K/V, so it does not attend."""
    program = reached("stream", *STEPS, "nvfp4_cache", layers=layers, head_dim=16)
    assert program.log[-1].matches == {"self-attention": 2 * layers - 1, "pages": 2 * layers}
    parts = ("codes", "scales", "decode_scales", "means")
    assert program.pages.keys() == {
        f"{name}_pages_{part}_{n}" for name in "kv" for part in parts for n in range(layers)
    }


@pytest.mark.parametrize("smoothing", [False, True])
def test_layers_share_a_region(smoothing: bool) -> None:
    program = quantised("regionalise", "lower", smoothing=smoothing)
    assert program.regions.keys() == {"prologue_block", "step_block", "commit_block_1"}
    named = {name for name in program.regions["step_block"].inputs if "pages" in name}
    parts = ["codes", "scales", "decode_scales", *(["means"] if smoothing else [])]
    assert named == {f"{name}_pages_{part}" for name in "kv" for part in parts}
    assert program.implementations == {
        "nvfp4_paged_attention": "decode",
        "nvfp4_write_page": "reference",
    }


def paged(program: Program, values: dict[str, Tensor], rule: str) -> dict[str, Tensor]:
    """The program's pages, holding ``values`` by the plain program's names."""
    result = {}
    smooth = "k_pages_means_0" in program.pages
    for name, value in values.items():
        arena, _, layer = name.rpartition("_")
        for part, tensor in zip(Pages._fields, written(value, smooth, rule), strict=True):
            if tensor is not None:
                result[f"{arena}_{part}_{layer}"] = tensor
    assert result.keys() == program.pages.keys()
    return result


def decoded(program: Program, values: dict[str, Tensor], rule: str) -> dict[str, Tensor]:
    """What ``values`` are once the program's pages were written with them and decoded."""
    smooth = "k_pages_means_0" in program.pages
    return {name: by_hand(value, smooth, rule) for name, value in values.items()}


@pytest.mark.parametrize("lowered", [(), ("regionalise", "lower")])
@pytest.mark.parametrize(("smoothing", "rule"), [(False, "none"), (True, "mse"), (True, "abs_max")])
def test_the_step_reads_what_pages_decode_to(
    smoothing: bool, rule: str, lowered: tuple[str, ...]
) -> None:
    """The plain step over pages quantised and decoded by hand."""
    before = reached("stream", *STEPS, head_dim=16)
    program = quantised(*lowered, smoothing=smoothing, rule=rule)
    given = inputs(before, "step") | {"table": torch.tensor([2, 0])}
    pages = {name: given.pop(name) + 1 for name in before.pages}
    ours = run(program, "step", given | paged(program, pages, rule))
    wanted = run(before, "step", given | decoded(program, pages, rule))
    assert difference(ours, wanted) < 1e-5
    assert difference(ours, run(before, "step", given | pages)) > 0.01
    other = decoded(program, {name: page.flip(1) for name, page in pages.items()}, rule)
    assert difference(ours, run(before, "step", given | other)) > 0.01


@pytest.mark.parametrize(("smoothing", "rule"), [(False, "none"), (True, "mse"), (True, "abs_max")])
def test_the_commit_writes_what_it_would_have_quantised(smoothing: bool, rule: str) -> None:
    """It writes its page's bytes, from the clean chunk's own K/V, and no other page's."""
    before = reached("stream", *STEPS, head_dim=16)
    program = quantised(smoothing=smoothing, rule=rule)
    given = inputs(before, "commit") | {"table": torch.tensor([2, 0]), "slot": torch.tensor([1])}
    pages = {name: given.pop(name) for name in before.pages}
    plain = run(before, "commit", given | decoded(program, pages, rule))
    held = paged(program, pages, rule)
    ours = held | run(program, "commit", given | held)
    assert plain.keys() == pages.keys()
    new = {name: plain[name][:, 1:2] for name in plain}
    for name, wanted in paged(program, new, rule).items():
        found = ours[name].contiguous().view(torch.uint8)
        assert torch.equal(found[:, 1:2], wanted.contiguous().view(torch.uint8)), name
        was = held[name].contiguous().view(torch.uint8)
        assert torch.equal(found[:, [0, 2, 3]], was[:, [0, 2, 3]])
        assert not torch.equal(found, was)


def test_without_pages_the_step_is_the_plain_one() -> None:
    before, program = reached("stream", *STEPS, head_dim=16), quantised()
    none = {"table": torch.empty(0, dtype=torch.int64)}
    plain, ours = (inputs(each, "step") | none for each in (before, program))
    shared = {name: value for name, value in plain.items() if name in ours}
    assert same(run(program, "step", ours | shared), run(before, "step", plain))


def test_heads_of_no_whole_blocks_are_refused() -> None:
    assert refused(after, reached("stream", *STEPS), "nvfp4_cache") == (
        "nvfp4_cache: self-attention of block 0: heads of 12 are not a multiple of 16, a block of "
        "NVFP4; remove it from the recipe's passes"
    )


def test_pages_that_step_and_commit_do_not_share_are_caught() -> None:
    program = quantised()
    verify(program)
    codes = inputs_of(program.graphs["step"], Role.PAGE_CODES)[2]
    codes.meta["val"] = codes.meta["val"].new_empty((1, 4, 8, 2, 4))
    assert refused(verify, program) == "step and commit differ in their pages: k_pages_codes_1"


# Memory


def of_one_block(name: str) -> Program:
    """A shipped recipe's program in bfloat16, before its cache is quantised."""
    recipe = open_recipe(name, ("model.dtype=bfloat16",))
    assert isinstance(recipe.model.config, str)
    config = named_config(recipe.model.config) | {"num_layers": 1}
    model = recipe.model.model_copy(update={"config": config})
    recipe = recipe.model_copy(update={"model": model})
    assert dict(recipe.steps()).keys() >= {"commit", "nvfp4_cache"}
    return transform(recipe, weights=False, stop_after="commit")


@pytest.mark.parametrize(
    ("name", "tokens", "least"),
    [
        ("wan22_5b_stream_nvfp4_cache", 8 * 880, {False: 3.555, True: 3.55}),
        ("tiny_stream_nvfp4_cache", 3 * 16, {False: 3.54, True: 3.30}),
    ],
)
def test_the_cache_is_smaller(name: str, tokens: int, least: dict[bool, float]) -> None:
    """Codes, scales, decode scales and means, against the same contract in bfloat16.

    The tiny model's pages are short, so that means weigh more.
    """
    program = of_one_block(name)
    heads, width = program.spec.heads, program.spec.head_dim
    pages = program.geometry.pages
    plain = estimate(program)["cache pages"]
    assert plain == 2 * pages * tokens * heads * width * 2
    for smoothing in (False, True):
        small = after(program, {"nvfp4_cache": {"smoothing": smoothing}}, "regionalise", "lower")
        page = tokens * (width // 2 + width // 16) + 4
        found = estimate(small)["cache pages"]
        assert found == 2 * pages * heads * (page + smoothing * 2 * width)
        assert least[smoothing] < plain / found < 32 / 9


def test_only_decoding_before_attention_gathers() -> None:
    def workspace(name: str) -> int:
        return activations(
            after(
                reached("stream", *LOWERED[:-1], head_dim=16),
                {"lower": {"nvfp4_paged_attention": name}},
            )
        )

    plain = activations(reached("stream", *STEPS, "regionalise", "lower", head_dim=16))
    assert workspace("decode") == workspace("decode_triton") == workspace("reference") == plain
    assert workspace("triton") < plain


def test_gpu_implementations_transform_here() -> None:
    from lltk.graph.module import instantiate

    before = reached("stream", *LOWERED[:-1], head_dim=16)
    program = after(before, {"lower": {"nvfp4_paged_attention": "triton"}})
    assert not any(calls(graph, NVFP4_PAGED_ATTENTION) for _, graph in program.every_graph())
    assert refused(instantiate, program) == (
        "nvfp4_paged_attention: triton runs on cuda, not on cpu; cpu has reference and decode and "
        "fp8_decode_torch: "
        "set nvfp4_paged_attention of the recipe's lower pass"
    )
