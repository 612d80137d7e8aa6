"""Ranks stream what one does; where one fails, all stop."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import Run, refused
from ranks import LIMIT, alike, ended, free_port, grouped, saved, started
from safetensors.torch import load_file
from sequence_parallel import (
    CASES,
    EXACT,
    SIZE,
    program,
    program_of_one,
    rolled,
    run_command,
    save_all,
    streamed,
    wide,
)
from streams import SHOTS, planned, save_pipeline
from test_nvfp4_cache_ops import read
from torch import Tensor
from torch.library import opcheck

from lltk.graph.recipe import open_recipe
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_paged_attention.reference import Pages
from lltk.parallel.exchange import (
    all_max,
    all_parts,
    heads_to_tokens,
    own_part,
    own_seed,
    receive_heads,
    send_tokens,
    tokens_to_heads,
)
from lltk.parallel.groups import SEQUENCE, find_group, rank_in, same_on_all
from lltk.parallel.ranks import Ranks, _check_alike, _own_device
from lltk.stream.state import read_state
from lltk.streaming import Models, StreamPlan, open_decoder, open_stream
from lltk.streaming.restoring import check_state
from lltk.streaming.stream import own_file

pytestmark = pytest.mark.cpu

BOUND = 2e-6
"""Between ranks' sums and one's, relative to the largest value: float32's rounding."""
ROUNDED = {
    "plain in fp8": 0.01,
    "plain in nvfp4": 0.03,
    "queries in fp8": 0.015,
    "nvfp4 pages in nvfp4": 0.04,
    "all": 0.045,
}
"""With values that are rounded before they are sent, by case. They make a third of it."""
PAGES_ROUNDED = {
    "plain in fp8": 0.03,
    "plain in nvfp4": 0.12,
    "queries in fp8": 0.015,
    "nvfp4 pages in nvfp4": 0.17,
    "all": 0.09,
}
"""By how much pages then differ at most, as a part of their norm; one is a third of it."""


@pytest.fixture(scope="module")
def groups(
    tmp_path_factory: pytest.TempPathFactory, pipeline: Path
) -> dict[int, list[dict[str, Tensor]]]:
    """What each of two ranks makes, and each of four; these without sessions."""
    folder = tmp_path_factory.mktemp("groups")
    paths = {size: [folder / f"{r}_of_{size}.safetensors" for r in range(size)] for size in (2, 4)}
    given = [(paths[2], pipeline), (paths[4], None)]
    saved(save_all, given)
    return {size: [load_file(path) for path in some] for size, some in paths.items()}


@pytest.fixture(scope="module")
def pair(groups: dict[int, list[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
    """What each of two ranks makes."""
    return groups[2]


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_stream_what_one_does(
    groups: dict[int, list[dict[str, Tensor]]], size: int, case: str
) -> None:
    """They make its samples, and hold parts of its pages: each rank has its own heads."""
    each, alone = groups[size], alone_rolled(case)
    first, *others = (one[f"{case}.samples"] for one in each)
    assert all(torch.equal(first, other) for other in others)
    found = apart(first, alone["samples"])
    if case in EXACT:
        assert found < BOUND
    else:
        assert ROUNDED[case] / 3 < found < ROUNDED[case]
    assert apart(first.roll(1, 0), alone["samples"]) > 0.3
    pages: dict[str, Tensor] = {}
    for name in alone.keys() - {"samples"}:
        dim = 3 if alone[name].dim() == 5 else 2
        parts = [one[f"{case}.{name}"] for one in each]
        assert parts[0].shape[dim] * len(each) == alone[name].shape[dim]
        pages[name] = torch.cat(parts, dim)
        whole, swapped = (torch.cat([p.float() for p in o], dim) for o in (parts, parts[::-1]))
        wanted = alone[name].float()
        if case == "nvfp4 pages" and name.split("_")[2] in ("codes", "scales"):
            assert torch.equal(whole, wanted), name
        elif case in EXACT:
            assert apart(whole, wanted) < (1e-2 if "means" in name else 5 * BOUND), name
        assert apart(swapped, wanted) > 0.1, name
    if case not in EXACT:
        wanted_values = values(alone)
        most = max(
            float((value - wanted_values[name]).norm() / wanted_values[name].norm())
            for name, value in values(pages).items()
        )
        assert PAGES_ROUNDED[case] / 3 < most < PAGES_ROUNDED[case]


@pytest.mark.parametrize("case", ["nvfp4 pages", "nvfp4 pages in nvfp4"])
def test_a_group_of_one_exchanges_with_itself(case: str) -> None:
    with grouped(0, 1, free_port()):
        found = rolled(program_of_one(case))
    alone = alone_rolled(case)
    assert all(found[name].shape == value.shape for name, value in alone.items())
    most = apart(found["samples"], alone["samples"])
    assert most < BOUND if case in EXACT else ROUNDED[case] / 3 < most < ROUNDED[case]


@cache
def alone_rolled(case: str) -> dict[str, Tensor]:
    """What one rank makes of a case."""
    return rolled(program(case, 1))


def values(pages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What pages stand for, by ``k`` or ``v`` and layer. Pages in NVFP4 are decoded."""
    found = {}
    for kind, layer in product("kv", range(2)):
        if (plain := f"{kind}_pages_{layer}") in pages:
            found[plain] = pages[plain]
        else:
            parts = ("codes", "scales", "decode_scales", "means")
            found[plain] = read(Pages(*(pages[f"{kind}_pages_{part}_{layer}"] for part in parts)))
    return found


def test_a_session_is_the_same_on_every_rank(pair: list[dict[str, Tensor]]) -> None:
    """With guidance, saved and restored. It is one rank's session but for the rounding of sums."""
    first, second = (each["session"] for each in pair)
    assert torch.equal(first, second)
    wanted = streamed(program("nvfp4 pages", 1))
    chunk = program("nvfp4 pages", 1).geometry.chunk
    assert apart(first[:, :, :chunk], wanted[:, :, :chunk]) < 1e-5  # it reads no page
    assert apart(first, wanted) < 1e-2 and apart(first.roll(1, 2), wanted) > 0.3


def test_every_rank_decodes_a_part_of_the_columns(
    pair: list[dict[str, Tensor]], pipeline: Path
) -> None:
    """They go on so after the stream is resumed. Only the first rank has the video."""
    parts, whole = pair[0]["film"], open_decoder(wide(pipeline)).decode(pair[0]["film latents"])
    assert parts.shape == whole.shape and float((parts - whole).abs().max()) < 1e-4
    assert float((parts.roll(1, -1) - whole).abs().max()) > 1e-2
    assert not pair[1]["film"].numel()


def test_every_rank_hears_of_a_page_that_is_not_finite(pair: list[dict[str, Tensor]]) -> None:
    """The page is on the second rank alone."""
    first, second = (bytes(each["stopped"].tolist()).decode() for each in pair)
    assert first == second
    assert first.startswith("chunk 0, commit: k_pages_decode_scales_1 of rank 1 is not finite; ")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 6, 3).to(dtype).requires_grad_()
    with alike():
        opcheck(tokens_to_heads, ([x, x[..., :1]], 2, SEQUENCE))
        opcheck(heads_to_tokens, ([x.transpose(1, 2)], 2, SEQUENCE))
        opcheck(receive_heads, (send_tokens([x], 2, SEQUENCE), [x], 2, SEQUENCE))
        opcheck(own_part, (x, 1, 2, SEQUENCE))
        opcheck(all_parts, (x, 2, 2, SEQUENCE))
        opcheck(all_max, (x.detach(), 2, SEQUENCE))
        opcheck(own_seed, (torch.tensor([3, 4]), 2, SEQUENCE))
        heads = torch.randn(2, 4, 6, 16).to(dtype).requires_grad_()
        for form in ("fp8", "nvfp4"):
            opcheck(overload("rounded_exchange"), ([heads, heads], True, form, 2, SEQUENCE))


def test_another_number_of_ranks_is_refused() -> None:
    assert rank_in(SEQUENCE, 1) == 0 and same_on_all(object(), SEQUENCE, 1)
    assert refused(find_group, SEQUENCE, 2) == (
        "ranks: the recipe is for 2, and 1 ran it; start torchrun --nproc-per-node 2 -m lltk …, "
        "or take a recipe without ulysses_stream (balanced_sp or naive_sp where it trains)"
    )
    with alike(4):
        assert refused(rank_in, SEQUENCE, 1) == (
            "ranks: the recipe is for 1, and 4 ran it; start one process, or take a recipe whose "
            "ulysses_stream (balanced_sp or naive_sp where it trains) has size 4"
        )


FAILING = """
import sys, time, torch
from lltk.parallel.exchange import all_parts
from lltk.parallel.groups import SEQUENCE
from lltk.parallel.ranks import joined

def run():
    with joined("cpu") as ranks:
        all_parts(torch.ones(3, 4), 0, 3, SEQUENCE)
        if ranks.rank == 0:
            raise ValueError("layer 3 is broken")
        while ranks.rank == 1:
            all_parts(torch.ones(3, 4), 0, 3, SEQUENCE)
        time.sleep(100)

try:
    run()
except ValueError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


def test_where_a_rank_fails_all_stop() -> None:
    """They stop at once, whether they wait for it or not. Only its message is shown."""
    begun = time.monotonic()
    (failed, _, err), *others = ended(started(3, "-c", FAILING))
    assert time.monotonic() - begun < LIMIT / 2
    assert failed == 2 and err == "error: layer 3 is broken\n"
    assert [(code, out) for code, out, _ in others] == [(1, "")] * 2
    said = "".join(silent for _, _, silent in others)
    assert "error:" not in said and "Traceback" not in said


KILLED = """
import os, signal, sys, torch
import torch.distributed as dist
from lltk.parallel.ranks import joined

def run():
    with joined("cpu") as ranks:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(3))

try:
    run()
except ValueError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


def test_where_a_rank_is_killed_one_message_says_so() -> None:
    """Also where torch's own exchange fails, such as FSDP2's."""
    codes, _, errors = zip(*ended(started(3, "-c", KILLED)), strict=True)
    assert codes[1] == -signal.SIGKILL and {codes[0], codes[2]} <= {1, 2}
    said = "".join(errors)
    assert said.count("has stopped") == 1 and "Traceback" not in said


def test_what_all_refuse_one_says(tmp_path: Path) -> None:
    shots = ["--prompt", "x", "-o", tmp_path / "video.mp4", "--device", "cuda:99"]
    results = ended(started(2, "-m", "lltk", "stream", "tiny_stream", *shots))
    said = "".join(out + err for _, out, err in results)
    assert said.count("cuda:99 is not here") == 1 and "Traceback" not in said
    assert sorted(code for code, _, _ in results) == [1, 2]


@dataclass(frozen=True)
class _Alone(Ranks):
    """A rank whose peers agree with it."""

    def any(self, flag: bool) -> bool:
        return flag


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_writes_and_speaks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: StreamPlan, rank: int
) -> None:
    """Each rank keeps its own part of the state."""

    @contextmanager
    def joined(device: str) -> Iterator[Ranks]:
        with alike(rank=rank):
            yield _Alone(rank, 2, torch.device(device))

    monkeypatch.setattr("lltk.parallel.ranks.joined", joined)
    monkeypatch.setattr("lltk.streaming.plan_stream", lambda *given, **options: plan)
    files = ["-o", tmp_path / "video.mp4", "--save", tmp_path / "state"]
    shots = ["--prompt", "a red circle", "--seconds", 2]
    code, out, err = run("stream", "tiny_stream", *shots, *files, "--device", "cpu")
    assert code == 0, err
    assert ("E2E FPS" in out and "ranks: 2" in out) == (rank == 0) == bool(out)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == ({"video.mp4", "state"} if rank == 0 else {"state.rank1"})


def test_a_rank_goes_on_from_its_own_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: StreamPlan
) -> None:
    path = tmp_path / "state.safetensors"
    with alike(rank=1):
        with open_stream(plan, None, SHOTS[:1]) as stream:
            next(stream.session)
            stream.save(path)
            wanted = [report.latents for report in stream]
        assert [each.name for each in tmp_path.iterdir()] == ["state.rank1.safetensors"]
        with open_stream(plan, None, resume=path) as stream:
            found = [report.latents for report in stream]
        assert wanted and torch.equal(torch.cat(found), torch.cat(wanted))
        compared = []
        monkeypatch.setattr(
            "lltk.streaming.models.same_on_all", lambda value, *given: compared.append(value)
        )
        red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, *plan.size)
        for seed, image in ((1, None), (1, None), (2, None), (1, red)):
            with Models(plan).open(None, SHOTS[:1], seed=seed, image=image) as stream:
                next(stream.session)
                stream.save(path)
            message = refused(open_stream, plan, None, resume=path)
            assert message == (
                f"{path}: its ranks' files are of different videos or chunks; resume another"
            )
    assert compared[0] == compared[1] and compared[0] not in compared[2:]


@pytest.mark.parametrize(("number", "hit"), [(signal.SIGTERM, (0, 1)), (signal.SIGHUP, (1,))])
def test_a_signal_to_any_rank_stops_all_with_their_states(
    tmp_path: Path, plan: StreamPlan, whole: Tensor, number: int, hit: Sequence[int]
) -> None:
    """They stop after the same chunk. The stream goes on as if it had not been stopped."""
    made = commanded(plan, tmp_path / "one", "--prompt", "a red circle", number=number, hit=hit)
    said = (tmp_path / "one.err0").read_text()
    assert made.codes[0] == 1 and "stopped: " in said and "--resume" in said
    assert len(read_state(tmp_path / "one.state.safetensors").timeline.chunks) == 3
    rest = commanded(plan, tmp_path / "rest", "--resume", tmp_path / "one.state.safetensors")
    assert rest.codes == [0, 0]
    assert torch.equal(torch.cat([made.frames, rest.frames]), whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_s_state_has_the_video_and_caches_of_that_rank(
    tmp_path: Path, plan: StreamPlan, rank: int
) -> None:
    path = own_file(tmp_path / "state", rank)
    with alike(rank=rank):
        with open_stream(plan, None if rank else lambda video: None, SHOTS[:1]) as stream:
            next(stream.session)
            stream.save(tmp_path / "state")
        state = read_state(path)
        whole, none = torch.zeros(1, 3, 1, *plan.size), torch.zeros(1, 3, 0, 0, 0)
        good, bad = (none, whole) if rank else (whole, none)
        caches = {"cache_0": torch.zeros(1)} if rank else {}

        def check(**changes: object) -> None:
            check_state(path, replace(state, delivery=replace(state.delivery, **changes)), plan)

        check(undelivered=[good])
        assert "video to deliver is torch.float32 [1, 3, " in refused(check, undelivered=[bad])
        assert f"{path}: decoder: cache_0 is missing, or is one" in refused(check, caches=caches)
        if rank == 0:
            assert "video to deliver is torch.float16" in refused(check, undelivered=[good.half()])
            assert "more video is to be" in refused(check, undelivered=[good] * 9)


def test_a_stream_for_two_ranks_is_refused_by_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: StreamPlan
) -> None:
    monkeypatch.setattr("lltk.streaming.plan_stream", lambda *given, **options: plan)
    shots = ["--prompt", "a red circle", "--seconds", 2, "-o", tmp_path / "video.mp4"]
    code, _, err = run("stream", "tiny_stream", *shots, "--device", "cpu")
    assert code == 2 and "the recipe is for 2, and 1 ran it; start torchrun" in err


@dataclass(frozen=True)
class Made:
    """What ranks made: their exit codes, and the frames of the first."""

    codes: Sequence[int | None]
    frames: Tensor


def commanded(
    plan: StreamPlan,
    files: Path,
    *given: object,
    number: int | None = None,
    hit: Sequence[int] = (),
) -> Made:
    """Stream in two processes; some get a signal. See `run_command`."""
    arguments = [*map(str, given), "-o", f"{files}.mp4"]
    port, fork = free_port(), multiprocessing.get_context("fork")
    processes = [
        fork.Process(
            target=run_command,
            args=(rank, port, plan, files, number if rank in hit else None, arguments),
        )
        for rank in range(SIZE)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        process.kill()
    return Made([p.exitcode for p in processes], load_file(f"{files}.frames")["frames"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, plan: StreamPlan) -> Tensor:
    """The frames of a stream that nothing stops."""
    made = commanded(plan, tmp_path_factory.mktemp("whole") / "v", "--prompt", "a red circle")
    assert made.codes == [0, 0]
    return made.frames


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> StreamPlan:
    """The plan of a stream for two ranks."""
    passes = [*open_recipe("tiny_stream", ()).passes]
    passes.insert(6, {"ulysses_stream": {"exchange": "compute"}})
    pipeline = save_pipeline(tmp_path_factory.mktemp("pipeline"))
    return planned(pipeline, f"passes={json.dumps(passes)}")


def test_ranks_need_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert _own_device(torch.device("cpu")) == torch.device("cpu")
    message = refused(_own_device, torch.device("cuda:1"))
    assert message == "ranks: cuda:1 is one GPU, and each rank needs its own; name cuda"
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert "this torch has no NCCL" in refused(_own_device, torch.device("cuda"))
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = refused(_own_device, torch.device("cuda"))
    assert message == "ranks: rank 3 needs a GPU of its own, there are 2"


def test_gpus_of_several_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(names: list[str], own: str) -> None:
        names[:] = [own, "NVIDIA H200"]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    message = refused(_check_alike, torch.device("cuda"))
    assert message.endswith("of one kind; rank 0 has NVIDIA H100, rank 1 has NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    _check_alike(torch.device("cuda"))
