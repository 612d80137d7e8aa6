"""Two ranks stream what one does; where one fails, both stop."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from helpers import refused
from ranks import LIMIT, alike, ended, free_port, started
from safetensors.torch import load_file
from sequence_parallel import CASES, SIZE, made_by, program, programs, rolled, save_made, streamed
from streams import SIZES, save_pipeline
from torch import Tensor
from torch.library import opcheck

from lltk.cli.recipes import open_recipe
from lltk.parallel.exchange import all_parts, heads_to_tokens, own_part, tokens_to_heads
from lltk.parallel.groups import SEQUENCE, find_group, rank_in, same_on_all
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.stream.video import read_video

pytestmark = pytest.mark.cpu

BOUND = 2e-6
"""Between ranks' sums and one's, relative to the largest value: float32's rounding."""
ROUNDED = 0.06
"""With keys and values in FP8."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two ranks makes; this process is the first."""
    port, path = free_port(), tmp_path_factory.mktemp("ranks") / "second.safetensors"
    programs()  # before the fork, so that they are made once
    second = multiprocessing.get_context("fork").Process(target=save_made, args=(1, port, path))
    second.start()
    try:
        first = made_by(0, port)
    finally:
        second.join(LIMIT)
        second.kill()
    return [first, load_file(path)]


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


@pytest.mark.parametrize("case", CASES)
def test_ranks_stream_what_one_does(pair: list[dict[str, Tensor]], case: str) -> None:
    """Samples, and in the ranks' pages the heads of one's."""
    alone = rolled(program(case, 1))
    bound = BOUND if CASES[case][1] == "compute" else ROUNDED
    first, second = (each[f"{case}.samples"] for each in pair)
    assert torch.equal(first, second)
    found = apart(first, alone["samples"])
    assert found < bound and (found > 1e-4) == (bound == ROUNDED)
    assert apart(first.roll(1, 0), alone["samples"]) > 0.3
    for name in alone.keys() - {"samples"}:
        dim = 3 if alone[name].dim() == 5 else 2
        halves = [each[f"{case}.{name}"] for each in pair]
        assert halves[0].shape[dim] * SIZE == alone[name].shape[dim]
        whole, swapped = (torch.cat([h.float() for h in o], dim) for o in (halves, halves[::-1]))
        wanted = alone[name].float()
        if case == "nvfp4 pages" and name.split("_")[2] in ("codes", "scales"):
            assert torch.equal(whole, wanted), name
        elif bound == BOUND:
            assert apart(whole, wanted) < (1e-2 if "means" in name else 5 * BOUND), name
        assert apart(swapped, wanted) > 0.1, name


def test_a_session_is_the_same_on_every_rank(pair: list[dict[str, Tensor]]) -> None:
    """With guidance, saved and restored."""
    first, second = (each["session"] for each in pair)
    assert torch.equal(first, second)
    wanted = streamed(program("nvfp4 pages", 1))
    assert apart(first, wanted) < 1e-4 and apart(first.roll(1, 2), wanted) > 0.3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 6, 3).to(dtype)
    with alike():
        opcheck(tokens_to_heads, ([x, x[..., :1]], 2, SEQUENCE))
        opcheck(heads_to_tokens, (x.transpose(1, 2), 2, SEQUENCE))
        opcheck(own_part, (x, 1, 2, SEQUENCE))
        opcheck(all_parts, (x, 2, 2, SEQUENCE))


def test_another_number_of_ranks_is_refused() -> None:
    assert rank_in(SEQUENCE, 1) == 0 and same_on_all(object(), SEQUENCE, 1)
    message = refused(find_group, SEQUENCE, 2)
    assert message.startswith("ranks: the program is for 2 and 1 ran it; start as many (torchrun ")
    with alike(4):
        assert "is for 2 and 4 ran it" in refused(find_group, SEQUENCE, 2)
        assert "is for 1 and 4 ran it" in refused(rank_in, SEQUENCE, 1)


FAILING = """
import sys, time, torch
from lltk.parallel.exchange import _swap
from lltk.parallel.groups import SEQUENCE
from lltk.parallel.ranks import joined

def run():
    with joined(torch.device("cpu")) as ranks:
        _swap([torch.ones(3, 4)], 3, SEQUENCE)
        if ranks.rank == 0:
            raise ValueError("layer 3 is broken")
        while ranks.rank == 1:
            _swap([torch.ones(3, 4)], 3, SEQUENCE)
        time.sleep(100)

try:
    run()
except ValueError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""


def test_where_a_rank_fails_all_stop() -> None:
    """At once, whether they wait for it or not, with its message alone."""
    begun = time.monotonic()
    (failed, _, err), *others = ended(started(3, "-c", FAILING))
    assert time.monotonic() - begun < LIMIT / 2
    assert failed == 2 and err == "error: layer 3 is broken\n"
    assert [(code, out) for code, out, _ in others] == [(1, "")] * 2
    assert not any("error" in silent or "Traceback" in silent for _, _, silent in others)


def test_the_command_streams_over_ranks(tmp_path: Path) -> None:
    """One writes the video and speaks; each keeps its part of the state."""
    passes = [*open_recipe("tiny_stream", ()).passes]
    passes.insert(6, {"ulysses_stream": {"exchange": "compute"}})
    pipeline = save_pipeline(tmp_path / "pipeline")
    changes = [*SIZES, f"stream.pipeline={pipeline}", f"passes={json.dumps(passes)}"]
    sets = [part for change in changes for part in ("--set", change)]
    video, state = tmp_path / "video.mp4", tmp_path / "state.safetensors"
    files = ["-o", video, "--save", state, "--prompt", "a red circle", "--seconds", "2"]
    command = ["-m", "lltk", "stream", "tiny_stream", *files, *sets, "--device", "cpu"]
    (code, out, err), (other, nothing, silent) = ended(started(2, *command))
    assert code == other == 0, err + silent
    assert "E2E FPS" in out and "ranks: 2" in out and not nothing
    assert len(read_video(video)) == 15
    parts = [load_file(path) for path in (state, tmp_path / "state.rank1.safetensors")]
    assert torch.equal(*(part["latents.1"] for part in parts))
    assert parts[0].keys() - parts[1].keys() == {n for n in parts[0] if n.startswith("decoder.")}
    assert not torch.equal(*(part["cache.k_pages_0"] for part in parts))
