"""GPUs stream what a CPU does, over NCCL; `torchrun` starts what users start."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from ranks import LIMIT, ended, free_port, grouped, started
from safetensors.torch import load_file
from sequence_parallel import CASES, EXACT, WAYS, program, program_of_one, rolled
from streams import SIZES, save_pipeline

from lltk.graph.recipe import open_recipe
from lltk.stream.state import read_state
from lltk.stream.video import read_video

pytestmark = pytest.mark.gpu

BOUNDS = {case: 0.01 if case in EXACT else 0.05 for case in CASES}
"""Of the samples' error, relative to their spread."""


@pytest.fixture
def _two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")


@pytest.mark.parametrize("case", CASES)
def test_exchanges_are_recorded(case: str) -> None:
    """One GPU is enough, which exchanges with itself. A replayed pass is the eager one."""
    made = program_of_one(case, "graphs")
    with grouped(0, 1, free_port(), "cpu:gloo,cuda:nccl"):
        eager, replayed = (rolled(made, "cuda", how) for how in ("eager", "graphs"))
    wanted = rolled(program(case, 1))["samples"]
    ours = replayed["samples"]
    assert float((ours - eager["samples"]).abs().max() / ours.abs().max()) < 1e-5
    assert float((ours - wanted).std() / wanted.std()) < BOUNDS[case]
    assert float((ours.roll(1, 0) - wanted).std() / wanted.std()) > 0.3


@pytest.mark.usefixtures("_two_gpus")
def test_ranks_stream_what_a_cpu_does(tmp_path: Path) -> None:
    """They do so eager and compiled, over NCCL."""
    results = ended(started(2, Path(__file__).with_name("sequence_parallel.py"), tmp_path))
    assert [code for code, _, _ in results] == [0, 0], "".join(err for _, _, err in results)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for case in CASES:
        wanted = rolled(program(case, 1))["samples"]
        for how in WAYS:
            name = f"{case}.{how}.samples"
            assert torch.equal(first[name], second[name])
            error = float((first[name] - wanted).std() / wanted.std())
            assert error < BOUNDS[case], (name, error)
            assert float((first[name].roll(1, 0) - wanted).std() / wanted.std()) > 0.3


def command(folder: Path, device: str, seconds: int) -> list[object]:
    """Arguments of Python that stream a tiny video over ranks."""
    passes = [*open_recipe("tiny_stream", ()).passes]
    passes.insert(6, {"ulysses_stream": {"exchange": "fp8"}})
    pipeline = save_pipeline(folder / "pipeline")
    changes = [*SIZES, f"stream.pipeline={pipeline}", f"passes={json.dumps(passes)}"]
    sets = [part for change in changes for part in ("--set", change)]
    files = ["-o", folder / "video.mp4", "--save", folder / "state.safetensors"]
    said = ["--prompt", "a red circle", "--seconds", seconds]
    return ["-m", "lltk", "stream", "tiny_stream", *files, *said, *sets, "--device", device]


@pytest.mark.usefixtures("_two_gpus")
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_command_streams_over_ranks(tmp_path: Path, device: str) -> None:
    results = ended(started(2, *command(tmp_path, device, 2)))
    (code, out, err), (other, nothing, silent) = results
    assert code == other == 0, err + silent
    assert "E2E FPS" in out and "ranks: 2" in out and not nothing
    assert len(read_video(tmp_path / "video.mp4")) == 13
    states = [tmp_path / name for name in ("state.safetensors", "state.rank1.safetensors")]
    ours, theirs = (read_state(path).timeline for path in states)
    assert ours == theirs and ours.index == 2
    parts = [load_file(path) for path in states]
    assert parts[0].keys() - parts[1].keys() == {n for n in parts[0] if n.startswith("decoder.")}
    assert not torch.equal(*(part["pages0.k_pages_0"] for part in parts))


@pytest.mark.usefixtures("_two_gpus")
@pytest.mark.parametrize("killed", [0, 1])
def test_where_a_rank_is_killed_the_other_stops(tmp_path: Path, killed: int) -> None:
    processes = started(2, *command(tmp_path, "cuda", 600))
    try:
        end = time.monotonic() + LIMIT
        while not (tmp_path / "video.mp4").exists():
            assert time.monotonic() < end and all(each.poll() is None for each in processes)
            time.sleep(0.1)
        processes[killed].kill()
        _, err = processes[1 - killed].communicate(timeout=10)
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - killed].returncode > 0
    assert err.count("rank 1 has stopped") == killed and "Traceback" not in err, err
