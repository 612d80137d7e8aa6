"""The torch runtime's buffers, the page table's state, the pass for a CPU's decoder, timing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import streams
import torch
from helpers import inputs, make_recipe, refused, run, runnable
from streams import planned, save_pipeline
from torch import Tensor

from lltk.compiler import transform
from lltk.graph.fingerprint import fingerprint
from lltk.graph.memory import activations
from lltk.graph.recipe import parse_recipe
from lltk.passes import make_pass
from lltk.stream.lanes import Lane
from lltk.stream.pages import PageTable
from lltk.stream.recipe import stream_section
from lltk.stream.runtimes import Runtime
from lltk.stream.runtimes.torch import TorchRuntime
from lltk.stream.timing import Stopwatch
from lltk.streaming import StreamPlan, check_plan, describe, open_stream, plan_stream, stream_memory

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> StreamPlan:
    return planned(save_pipeline(tmp_path_factory.mktemp("pipeline")))


def text(seed: int) -> Tensor:
    return torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_buffers_stay_where_they_are() -> None:
    """Prompts, commits and restoring copy into them."""
    runtime = TorchRuntime(*runnable(make_recipe("stream")))
    checked: Runtime = runtime
    assert checked.dtype == torch.float32 and checked.device.type == "cpu"
    runtime.set_prompt(text(0))
    buffers = {**runtime._text, **runtime.state()}
    addresses = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    latents, positions = torch.randn(1, 4, 2, 4, 4), torch.arange(2, dtype=torch.float64)
    timestep = torch.full((1, 2), 500.0)
    first = runtime.step(latents, timestep, positions, ())
    runtime.commit(latents, positions, (), 2)
    second = runtime.step(latents, timestep, positions + 2, (2,))
    saved = {name: page.clone() for name, page in runtime.state().items()}
    runtime.set_prompt(text(1))
    assert not torch.equal(runtime.step(latents, timestep, positions, ()), first)
    runtime.commit(latents, positions, (), 2)
    runtime.set_prompt(text(0))
    assert not torch.equal(runtime.step(latents, timestep, positions + 2, (2,)), second)
    runtime.restore(saved)
    assert torch.equal(runtime.step(latents, timestep, positions + 2, (2,)), second)
    runtime.clear()
    assert not any(page.any() for page in runtime.state().values())
    buffers = {**runtime._text, **runtime.state()}
    assert {name: buffer.data_ptr() for name, buffer in buffers.items()} == addresses
    del saved["k_pages_1"]
    assert "are not this program's" in refused(runtime.restore, saved)


@torch.no_grad()
def test_pages_that_are_not_there_are_refused() -> None:
    """Neither may a page be listed twice, nor be both listed and written. No kernel runs then."""
    runtime = TorchRuntime(*runnable(make_recipe("stream")))
    assert runtime.geometry.pages == 4
    runtime.set_prompt(text(0))
    latents, positions = torch.randn(1, 4, 2, 4, 4), torch.arange(2, dtype=torch.float64)
    passes, commit = (latents, torch.full((1, 2), 500.0), positions), (latents, positions)
    calls: list[Callable[[], object]] = []
    for table in ((4,), (-1,), (1, 1)):
        calls += [partial(runtime.step, *passes, table), partial(runtime.first_bad, *passes, table)]
    for table, slot in (((4,), 2), ((1, 1), 2), ((2,), 2), ((), 4), ((), -1)):
        found = torch.ones(2)
        calls.append(partial(runtime.commit, *commit, table, slot))
        calls.append(partial(runtime.first_bad_commit, *commit, table, slot, found))
    calls += [partial(runtime.magnitudes, slot) for slot in (4, -1)]
    for call in calls:
        with pytest.raises(AssertionError, match="are not different ones of 4"):
            call()
    assert not any(page.any() for page in runtime.pages.values())


def test_a_page_table_goes_on_from_its_state() -> None:
    geometry = make_recipe("stream", window=10).geometry
    whole, part = PageTable(geometry), PageTable(geometry)
    opens = [index in (0, 3, 4, 9) for index in range(14)]
    wanted = [whole.commit(flag) for flag in opens]
    made = [part.commit(flag) for flag in opens[:6]]
    other = PageTable(geometry)
    other.restore(json.loads(json.dumps(part.state)))
    assert made + [other.commit(flag) for flag in opens[6:]] == wanted


def test_onednn_gives_the_same_video(plan: StreamPlan) -> None:
    """Up to rounding; it takes every convolution, and refuses what it is not for."""
    program = plan.decoders[0].program
    (entry,) = (entry for entry in program.log if entry.name == "onednn_conv3d")
    plain = transform(parse_recipe({**program.recipe, "passes": ["canonicalise"]}, "test"))
    count = sum(
        node.target is torch.ops.aten.conv3d.default
        for graph in plain.graphs.values()
        for node in graph.nodes
    )
    assert entry.matches == {"conv3d": count}
    generator = torch.Generator().manual_seed(0)
    given = {
        name: torch.randn(spec.shape, generator=generator)
        for name, spec in plain.contract("step").inputs.items()
    }
    ours, theirs = (run(each, "step", given)["video"] for each in (program, plain))
    assert float((ours - theirs).abs().max()) < 1e-4 < float(theirs.std())
    assert fingerprint(program) != fingerprint(plain)
    assert fingerprint(plan.decoders[0].program) == fingerprint(program)
    keys = (*streams.SIZES, f"stream.pipeline={plan.folder}", "stream.decoder.compile=true")
    compiled = plan_stream(streams.open_recipe("tiny_stream", keys)).decoders[0].program
    assert [entry.name for entry in compiled.log] == ["canonicalise"]
    wide = make_pass("onednn_conv3d", {})
    plain.dtype = torch.bfloat16
    assert "is for float32" in refused(wide.requires, plain)


def test_activations_are_measured_ones(plan: StreamPlan) -> None:
    """The most that lives at once, compared with what the allocator sees on a run."""
    program, module = runnable(make_recipe("stream", layers=3, height=128, width=128))
    given = inputs(program, "step")
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad():
        module("step", dict(given))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            module("step", dict(given))
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0.5 * peak < activations(program) < 2 * peak


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.measure("sleep"):
            time.sleep(0.01)
    first = watch.read()
    assert list(first) == ["sleep"] and 0.02 <= first["sleep"] < 0.2
    assert watch.read() == {}


def test_stream_sections() -> None:
    """Defaults, and errors that name the key."""
    section = stream_section({"pipeline": "p", "fps": 16}, "r.yaml")
    assert (section.steps, section.shift, section.guidance, section.text.after) == (4, 5, 1, "free")
    for data, message in (
        (None, "r.yaml: has no stream section; add one with at least pipeline and fps"),
        ({"pipeline": "p", "fsp": 1}, "r.yaml: stream: fps: Field required; unknown key 'fsp'"),
        ({"pipeline": "p", "fps": 16, "steps": 0}, "stream: steps: "),
        ({"pipeline": "p", "fps": 16, "text": {"aftr": "keep"}}, "did you mean 'after'?"),
    ):
        assert message in refused(stream_section, data, "r.yaml")


def test_cuda_graphs_need_a_gpu() -> None:
    from lltk.stream.runtimes.cuda_graph import CudaGraphs

    lane = Lane(torch.device("cpu"))
    message = refused(CudaGraphs, lane)
    assert "stream.cuda_graphs: is for GPUs, not for cpu; set it to false" in message
    message = refused(CudaGraphs, lane, "stream.decoder.cuda_graphs")
    assert message.endswith("--set stream.decoder.cuda_graphs=false")


def test_shipped_recipes_stream() -> None:
    from lltk.graph.recipe import open_recipe
    from lltk.graph.recipe_files import shipped

    streams = [name for name in shipped() if "_stream" in name]
    assert {"tiny_stream", "tiny_stream_fp8", "wan22_5b_stream"} <= set(streams)
    for name in streams:
        assert stream_section(open_recipe(name, ()).stream, name).fps > 0


def test_pipelines_are_found_by_path_or_name(tmp_path: Path) -> None:
    from lltk.models.pipelines import find_pipeline

    assert find_pipeline(str(tmp_path)) == tmp_path
    assert "a shipped one: tiny" in refused(find_pipeline, str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("device=[]", "recipe: stream: device: () names none; write cpu, cuda"),
        ("device=gpu", "recipe: stream: device: 'gpu' names none; write cpu"),
        ("device=[cpu, cuda:99]", "stream.decoder.device: cuda:99 is not here; there is cpu"),
        ("device=[cpu, cpu, cpu, cpu, cpu]", "stream.decoder.device: names 5, and a frame's"),
        ("latents=3", "stream.decoder.latents: 3 are never at hand, a chunk has 2"),
    ],
)
def test_decoders_that_cannot_be(plan: StreamPlan, override: str, message: str) -> None:
    keys = (*streams.SIZES, f"stream.pipeline={plan.folder}", f"stream.decoder.{override}")
    recipe = streams.open_recipe("tiny_stream", keys)
    assert refused(lambda: check_plan(plan_stream(recipe))).startswith(message)


def test_a_decoder_is_recorded_on_gpus(tmp_path: Path) -> None:
    folder = streams.save_pipeline(tmp_path)
    keys = (*streams.SIZES, f"stream.pipeline={folder}", "stream.decoder.cuda_graphs=true")
    plan = plan_stream(streams.open_recipe("tiny_stream", keys), "cpu")
    message = refused(open_stream, plan, lambda video: None, streams.SHOTS)
    assert "stream.decoder.cuda_graphs: is for GPUs, not for cpu" in message
    for where in ("cuda:0", "cuda:1"):
        recipe = streams.open_recipe("tiny_stream", (*keys, f"stream.decoder.device={where}"))
        plan = plan_stream(recipe, "cuda:0")
        assert "CUDA graphs, passes" in describe(plan)["decoder"]
        sizes = stream_memory(plan)[where]
        assert sizes["decoder: CUDA graphs"] == (
            2 * sizes["decoder: feature caches"] + sizes["decoder: activations"]
        )


def test_a_lane_gives_turns_in_the_order_they_were_asked_for() -> None:
    """One call runs at a time. A call that is interrupted as it waits holds nobody up."""
    lane, order, inside = Lane(torch.device("cpu")), [], []

    def work(name: int) -> None:
        with lane.turn():
            inside.append(name)
            order.append(name)
            assert inside == [name]
            inside.remove(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    with lane.turn():
        for thread in threads:
            asked = len(lane._queue)
            thread.start()
            while len(lane._queue) == asked:
                time.sleep(0.001)
        interrupted = lane.turn()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lane._moved, "wait_for", lambda ready: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                interrupted.__enter__()
        assert not order
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3] and not lane._queue
