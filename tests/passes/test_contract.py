"""What every pass holds to: its input, both state dicts, export, the log, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import (
    CANONICAL,
    PASSES,
    after,
    captured,
    difference,
    inputs,
    randomise,
    reached,
    reexported,
    refused,
    run,
    same,
    texts,
)
from ranks import alike
from torch import Tensor

from lltk.compiler import with_weights
from lltk.graph.contract import Role, TensorSpec
from lltk.graph.edit import copy_graph, input_of
from lltk.graph.geometry import Kind
from lltk.graph.infer import infer
from lltk.graph.passes import Numerics
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.passes import make_pass, pass_names

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def _ranks() -> Iterator[None]:
    """The program is for two ranks, of which one runs."""
    with alike():
        yield


@dataclass(frozen=True)
class Case:
    """A pass, where it stands, and what it declares."""

    name: str
    kind: Kind
    numerics: str
    leaves: Stage
    steps: tuple[str, ...]
    head_dim: int = 12
    lossy: bool = False
    """Whether a state dict that comes back is only near to what it was."""
    frames: int = 6

    @property
    def sizes(self) -> dict[str, int]:
        return {"layers": 1, "head_dim": self.head_dim, "frames": self.frames}

    def original(self) -> Program:
        return captured(self.kind, **self.sizes)

    def before(self) -> Program:
        return reached(self.kind, *self.steps, **self.sizes)

    def after(self) -> Program:
        return reached(self.kind, *self.steps, self.name, **self.sizes)


STREAM, SCORE, TRAIN = PASSES["stream"], PASSES["score"], PASSES["train"]
W8A8 = (*STREAM[:6], "fp8_infer")
PAGES = (*STREAM[:6], "nvfp4_cache", "fp8_infer")
CANON, CAUSAL = Stage.CANONICAL, Stage.CAUSAL
CASES = [
    Case("canonicalise", "train", "bitwise", CANON, ()),
    Case("per_frame_timesteps", "score", "rounding", CANON, CANONICAL[:1]),
    Case("frame_positions", "score", "bitwise", CANON, CANONICAL[:2]),
    Case("text_per_chunk", "train", "changing", CANON, CANONICAL),
    Case("teacher_forcing", "train", "changing", CAUSAL, TRAIN[:4]),
    Case("block_causal", "score", "changing", CAUSAL, SCORE[:4]),
    Case("bidirectional", "reference", "bitwise", CAUSAL, PASSES["reference"][:4]),
    Case("hoist_text", "stream", "bitwise", CANON, CANONICAL),
    Case("cached_step", "stream", "changing", CANON, STREAM[:4]),
    Case("commit", "stream", "bitwise", CAUSAL, STREAM[:5]),
    Case("bounded_positions", "stream", "changing", CAUSAL, STREAM[:6]),
    Case("nvfp4_cache", "stream", "changing", Stage.QUANTISED, STREAM[:6], head_dim=16),
    Case("nvfp4_infer", "stream", "changing", Stage.QUANTISED, STREAM[:6], 16, lossy=True),
    Case("fp8_infer", "stream", "changing", Stage.QUANTISED, STREAM[:6], 16, lossy=True),
    Case("fuse_rows", "stream", "rounding", Stage.QUANTISED, W8A8, 16, lossy=True),
    Case("fuse_attention_quantise", "stream", "rounding", Stage.QUANTISED, PAGES, 16, lossy=True),
    Case("fuse_norm_rope", "stream", "rounding", CAUSAL, STREAM[:6]),
    Case("hoist_modulation", "stream", "bitwise", CAUSAL, STREAM[:6]),
    Case("merge_qkv", "stream", "rounding", CAUSAL, STREAM[:6]),
    Case("nvfp4_train", "train", "changing", Stage.QUANTISED, TRAIN[:5], head_dim=16),
    Case("lora", "stream", "bitwise", CAUSAL, STREAM[:6]),
    Case("merge_lora", "score", "rounding", CANON, (*CANONICAL, "lora")),
    Case("balanced_sp", "train", "changing", Stage.PARTITIONED, TRAIN[:5], frames=8),
    Case("naive_sp", "train", "changing", Stage.PARTITIONED, TRAIN[:4], frames=8),
    Case("ulysses_stream", "stream", "changing", Stage.PARTITIONED, STREAM[:6]),
    Case("externalise", "stream", "rounding", CAUSAL, STREAM[:6]),
    Case("join_commit", "stream", "bitwise", CAUSAL, (*STREAM[:6], "externalise")),
    Case("regionalise", "stream", "bitwise", Stage.REGIONAL, STREAM[:6]),
    Case("lower", "stream", "rounding", Stage.LOWERED, STREAM[:7]),
]
DECODE = ["channels_last", "fold_upsample", "fp8_convolve", "fuse_norm_silu", "onednn_conv3d"]
"""For decode and encode programs: tests/test_decode_passes.py, tests/test_vae_encoder.py and
tests/test_runtime.py have their cases."""
every_pass = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_every_pass_has_a_case() -> None:
    assert sorted([*DECODE, *(case.name for case in CASES)]) == pass_names()


@every_pass
def test_log_states_what_ran(case: Case) -> None:
    program = case.after()
    entry = program.log[-1]
    assert (entry.name, entry.numerics, entry.stage) == (case.name, case.numerics, case.leaves)
    assert program.stage == case.leaves and Numerics(entry.numerics)
    assert sum(entry.matches.values()) > 0
    assert entry.config == make_pass(case.name, {}).config.model_dump(mode="json")
    assert entry.ops_before == case.before().count_ops()
    assert entry.ops_after == program.count_ops()
    assert [entry.name for entry in program.log] == [*case.steps, case.name]


@every_pass
def test_every_input_has_a_role(case: Case) -> None:
    """The same role under the same name in every graph, and only the repeated ones more than once.

    A layer has several pages, prompts, parts of weights; of everything else a graph reads one.
    """
    several = {Role.PROMPT, Role.WEIGHTS, *(role for role in Role if role.is_page)}
    seen: dict[str, Role | None] = {}
    for name in case.after().graphs:
        inputs = case.after().contract(name).inputs
        roles = [spec.role for spec in inputs.values()]
        assert None not in roles, f"{name}: {inputs}"
        assert all(roles.count(role) == 1 for role in set(roles) - several), roles
        for key, spec in inputs.items():
            assert seen.setdefault(key, spec.role) is spec.role


@every_pass
def test_input_is_left_alone_and_the_result_repeats(case: Case) -> None:
    before = case.before()
    was = texts(before), list(before.weights), list(before.constants), len(before.log)
    again = after(before, case.name)
    assert (texts(before), list(before.weights), list(before.constants), len(before.log)) == was
    assert texts(again) == texts(case.after())
    assert texts(again) != texts(before)


@every_pass
def test_values_are_known_as_they_would_be_from_nothing(case: Case) -> None:
    """Metadata is kept where a call's arguments did not change, and must be right there."""
    program = case.after()
    for _, graph in program.every_graph():
        anew = copy_graph(graph)
        for node in anew.nodes:
            if node.op == "call_function":
                del node.meta["val"]
        infer(program, anew)
        for kept, made in zip(graph.nodes, anew.nodes, strict=True):
            if kept.op == "call_function":
                assert _like(kept.meta["val"]) == _like(made.meta["val"]), kept.name


def _like(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return [_like(part) for part in value] if isinstance(value, (list, tuple)) else value


def test_a_changed_argument_changes_what_follows() -> None:
    program = captured("stream", layers=1)
    graph = copy_graph(program.graphs["forward"])
    infer(program, graph)
    latents = input_of(graph, Role.LATENTS)
    batch, channels, *rest = latents.meta["val"].shape
    latents.meta["val"] = latents.meta["val"].new_empty((batch, channels + 1, *rest))
    assert "does not fit its arguments" in refused(infer, program, graph)


@every_pass
def test_loads_the_original_state_dict(case: Case) -> None:
    """The captured model's weights, mapped, give what the pass made of them itself."""
    program, original = case.after(), case.original().weights
    loaded = with_weights(program, original)
    other = with_weights(program, randomise(original, seed=1))
    for graph in program.graphs:
        given = inputs(program, graph)
        assert same(run(loaded, graph, given), run(program, graph, given))
        assert not same(run(other, graph, given), run(program, graph, given))


@every_pass
def test_loads_the_transformed_state_dict(case: Case) -> None:
    program = case.after()
    own = randomise(program.weights, seed=2)
    loaded = with_weights(program, own)
    assert same(loaded.weights, own)
    graph = next(reversed(program.graphs))
    given = inputs(program, graph)
    assert not same(run(loaded, graph, given), run(program, graph, given))


@every_pass
def test_state_dicts_map_both_ways(case: Case) -> None:
    program, original = case.after(), case.original().weights
    mapped = program.map_state(original)
    assert same(mapped, program.weights)
    back = program.unmap_state(mapped)
    if case.lossy:
        assert 0 < difference(back, original) < 0.2
    else:
        assert same(back, original)
        assert same(program.map_state(back), mapped)


@every_pass
def test_misfit_state_dicts_are_refused(case: Case) -> None:
    program, state = case.after(), dict(case.original().weights)
    del state["proj_out.weight"]
    assert "1 missing (proj_out.weight)" in refused(with_weights, program, state)


@every_pass
def test_result_exports_again(case: Case) -> None:
    program = case.after()
    for graph in program.graphs:
        given = inputs(program, graph)
        assert same(reexported(program, graph, given), run(program, graph, given))


@every_pass
def test_unknown_option_is_refused(case: Case) -> None:
    message = refused(make_pass, case.name, {"sede": 1})
    assert message.startswith(f"passes: {case.name}: unknown key 'sede'")


@every_pass
def test_second_run_is_refused(case: Case) -> None:
    done = ", ".join((*case.steps, case.name))
    assert refused(after, case.after(), case.name) == (
        f"{case.name}: has run already (passes so far: {done}); name it once in the recipe"
    )


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_too_early_is_refused(case: Case) -> None:
    stage = " or ".join(str(stage) for stage in make_pass(case.name, {}).reads)
    assert refused(after, captured(case.kind, layers=1), case.name) == (
        f"{case.name}: reads a {stage} program, this one is captured (passes so far: none); "
        "move it later in the recipe's passes"
    )


@every_pass
def test_too_late_is_refused(case: Case) -> None:
    """The program is finished and its log is gone, so that the log cannot show the pass."""
    program = replace(reached(case.kind, *PASSES[case.kind], layers=1), log=[])
    stage = " or ".join(str(stage) for stage in make_pass(case.name, {}).reads)
    assert refused(after, program, case.name) == (
        f"{case.name}: reads a {stage} program, this one is {program.stage} (passes so far: "
        "none); move it earlier in the recipe's passes"
    )


@pytest.mark.parametrize(
    ("name", "kinds", "kind"),
    [
        ("text_per_chunk", "train and score and reference", "stream"),
        ("teacher_forcing", "train", "score"),
        ("block_causal", "score", "train"),
        ("bidirectional", "reference", "score"),
        ("hoist_text", "stream", "score"),
        ("cached_step", "stream", "train"),
        ("commit", "stream", "score"),
        ("externalise", "stream", "score"),
    ],
)
def test_wrong_kind_is_refused(name: str, kinds: str, kind: Kind) -> None:
    assert refused(after, captured(kind, layers=1), name) == (
        f"{name}: is for {kinds} programs, this one is for {kind}; "
        "remove it from the recipe's passes"
    )


@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize("name", pass_names())
def test_any_order_runs_or_is_refused_by_name(name: str, kind: Kind) -> None:
    """No order of passes ends in anything but a Program or an error that names the pass."""
    prefixes = [PASSES[kind][:length] for length in range(len(PASSES[kind]) + 1)]
    if kind == "stream":
        prefixes.append(("canonicalise", "hoist_text"))
    for steps in prefixes:
        program = reached(kind, *steps, layers=1)
        try:
            after(program, name)
        except ValueError as error:
            assert str(error).startswith(f"{name}: "), f"after {steps}: {error}"


def test_unknown_pass_is_refused() -> None:
    assert refused(make_pass, "comit", {}) == "there is no pass 'comit'; did you mean 'commit'?"
    assert "passes: balanced_sp, bidirectional, block_causal" in refused(make_pass, "zzz", {})


@pytest.mark.parametrize("kind", PASSES)
def test_contracts_hold_in_bfloat16(kind: Kind) -> None:
    program = reached(kind, *PASSES[kind], layers=1, dtype="bfloat16")
    for graph in program.graphs:
        contract = program.contract(graph)
        given = inputs(program, graph)
        result = run(program, graph, given)
        assert result.keys() >= contract.outputs.keys()
        specs = contract.inputs | contract.outputs
        assert {n: TensorSpec.of(v) for n, v in result.items()} == {n: specs[n] for n in result}
        assert all(bool(torch.isfinite(value).all()) for value in result.values())


def test_a_failed_pass_leaves_the_program_as_it_was() -> None:
    before = reached("stream", *CANONICAL, layers=1)
    was = texts(before)
    assert "put hoist_text before it" in refused(after, before, "lora", "cached_step")
    assert texts(before) == was and len(before.log) == len(CANONICAL)
