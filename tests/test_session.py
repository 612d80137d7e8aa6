"""Sessions: what a chunk is made from, what changes the cache, and what goes on after a save."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import streams
import torch
from helpers import refused
from safetensors.torch import load_file
from streams import SHOTS, opened, planned, save_pipeline, streamed
from torch import Tensor

from lltk.files.tensors import save_tensors
from lltk.graph.module import ProgramModule, instantiate
from lltk.models import wan_vae
from lltk.stream.denoise import chunk_noise
from lltk.stream.image import read_image
from lltk.stream.report import ChunkReport
from lltk.stream.rollout import Rollout
from lltk.stream.sampler import Sampler, Schedule, guided
from lltk.stream.script import Shot
from lltk.stream.state import SessionState, load_state
from lltk.stream.text import TextEncoder
from lltk.streaming import Stream, StreamPlan, describe, open_stream
from lltk.streaming.identity import identity
from lltk.streaming.restoring import check_state

pytestmark = pytest.mark.cpu


def cached(stream: Stream) -> dict[str, Tensor]:
    """A copy of the cache."""
    return {name: page.clone() for name, page in stream.session.pages.items()}


def by_hand(plan: StreamPlan, chunks: int, guidance: float = 1.0) -> Tensor:
    """The first chunks of `SHOTS`, made from the parts that a session puts together."""
    section, program = plan.section, plan.transformer
    module = instantiate(program)
    encoder = TextEncoder(plan.folder, program.geometry.text_tokens)
    schedule = Schedule.make(section.steps, section.shift)
    rollouts = [Rollout(program, module) for _ in range(2)]
    done, cuts = [], 0
    with torch.no_grad():
        for chunk in plan.chunking.chunks(SHOTS)[:chunks]:
            cuts += chunk.opens_shot and chunk.index > 0
            positions = torch.arange(2.0, dtype=torch.float64) + 2 * chunk.index
            positions += cuts * section.shot_offset
            for rollout, text in zip(
                rollouts, (chunk.prompt, section.negative_prompt), strict=True
            ):
                rollout.set_text(encoder.encode([text]))
            sampler = Sampler(schedule, chunk_noise(section.seed, chunk.index, (1, 4, 2, 2, 4)))
            for step, level in enumerate(schedule.timesteps):
                time = torch.full((1, 2), float(level))
                both = [r.step(sampler.latents, time, positions) for r in rollouts]
                sampler.step(step, guided(both[0], both[1], guidance))
            for rollout in rollouts:
                rollout.commit(sampler.result, positions, chunk.opens_shot)
            done.append(sampler.result)
    return torch.cat(done, dim=2)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_chunks_are_what_the_parts_give(pipeline: Path, guidance: float) -> None:
    """Prefix, offset, sampler, guidance over a second cache, commit, and the decoder's video."""
    plan = planned(
        pipeline,
        f"stream.guidance={guidance}",
        "stream.negative_prompt=grey",
        "stream.shot_offset=1.5",
        "stream.shift=3",
        "stream.steps=3",
    )
    latents, video = streamed(plan)
    assert latents.shape == (1, 4, 12, 2, 4)
    assert video.shape == (1, 3, 45, 32, 64)
    wanted = by_hand(plan, 6, guidance)
    worst = float((latents - wanted).abs().max() / wanted.abs().max())
    assert worst < 1e-5
    for other in (
        "stream.shot_offset=0",
        "stream.shift=5",
        "stream.guidance=1.5",
        "stream.scene_cut=cut ",
    ):
        changed, _ = streamed(planned(pipeline, *_overrides(plan), other))
        assert float((changed - wanted).abs().max()) > 1e-3, other
    decoder = opened(plan)[0].session.delivery._decoder
    assert torch.equal(decoder.decode(latents), video)


def _overrides(plan: StreamPlan) -> list[str]:
    keys = ("guidance", "negative_prompt", "shot_offset", "shift", "steps")
    return [f"stream.{key}={getattr(plan.section, key)}" for key in keys]


def test_only_guidance_has_a_second_cache(pipeline: Path) -> None:
    for guidance, caches in ((1.0, 1), (1.5, 2)):
        stream, _ = opened(planned(pipeline, f"stream.guidance={guidance}"))
        assert [len(pages) for pages in stream.session.state().pages] == [4] * caches


@pytest.mark.parametrize("steps", [50, 3, 2])
def test_any_number_of_steps(pipeline: Path, steps: int) -> None:
    plan = planned(pipeline, f"stream.steps={steps}")
    latents, _ = streamed(plan, SHOTS[:1])
    assert torch.isfinite(latents).all()


# Noise


def test_noise_follows_from_seed_item_and_chunk() -> None:
    shape = (4, 2, 2, 4)
    both = chunk_noise(3, 0, (2, *shape))
    alone = [chunk_noise(seed, 0, (1, *shape)) for seed in (3, 4)]
    assert torch.equal(both, torch.cat(alone))
    assert not torch.equal(both[0], both[1])
    noise = [chunk_noise(3, chunk, (1, *shape)) for chunk in range(3)]
    assert torch.equal(noise[0], both[:1])
    assert len({float(part.sum()) for part in noise}) == 3
    assert abs(float(torch.cat(noise).std()) - 1) < 0.1


# Sessions do not meet


def test_at_rest_all_that_was_made_is_video(plan: StreamPlan) -> None:
    _, whole = streamed(plan)
    stream, video = opened(plan)
    with stream:
        for report in stream:
            stream.session.delivery.rest()
            assert sum(part.shape[2] for part in video) == report.chunk.frames.stop
    assert torch.equal(torch.cat(video, dim=2), whole)


def test_interleaved_sessions_are_as_alone(pipeline: Path, plan: StreamPlan) -> None:
    other = planned(pipeline, "stream.seed=7")
    alone = [streamed(each) for each in (plan, other)]
    (one, one_video), (two, two_video) = opened(plan), opened(other)
    made: list[list[Tensor]] = [[], []]
    with one, two:
        torch.manual_seed(123)
        for _ in range(6):
            torch.rand(5)
            for stream, into in zip((one, two), made, strict=True):
                into.append(next(stream.session).latents)
    for latents, video, (wanted, wanted_video) in zip(
        made, (one_video, two_video), alone, strict=True
    ):
        assert torch.equal(torch.cat(latents, 2), wanted)
        assert torch.equal(torch.cat(video, 2), wanted_video)
    assert not torch.equal(alone[0][0], alone[1][0])


# Pages


def test_sinks_keep_their_bytes(pipeline: Path) -> None:
    """They do through cuts, switches and recaches."""
    script = [*SHOTS, SHOTS[0].model_copy(update={"seconds": 5.0})]
    stream, _ = opened(planned(pipeline, "stream.recache=true"), script)
    before: dict[int, dict[str, Tensor]] = {}
    changed = 0
    with stream:
        while stream.session.timeline.chunks:
            if stream.session.timeline.index in (2, 8):
                stream.switch("a green star falling")
            next(stream.session)
            slots, sinks = stream.session.table.slots, stream.session.table.sinks()
            held = {
                chunk: {name: page[:, slot].clone() for name, page in cached(stream).items()}
                for chunk, slot in slots.items()
            }
            for chunk in before.keys() & held.keys():
                same = all(torch.equal(before[chunk][n], held[chunk][n]) for n in held[chunk])
                assert same or chunk not in sinks, f"sink {chunk}"
                changed += not same
            before = held
    assert changed, "no recache wrote a page"


def test_recache_is_committing_from_scratch(plan: StreamPlan) -> None:
    """Sinks stay. Every other held chunk is committed under the new prompt, oldest first."""
    script = [Shot(caption="a red circle moving left", seconds=6)]
    prompt = "a green star falling"
    stream, _ = opened(plan, script)
    latents = []
    with stream:
        for _ in range(5):
            latents.append(next(stream.session).latents)
        table = stream.session.table.next_pages()
        stream.switch(prompt, recache=True)
        slots, before = stream.session.table.slots, cached(stream)
        report = next(stream.session)
        after = cached(stream)
    assert report.graphs["recache"] > 0
    assert sorted(slots) == [0, 3, 4]

    program = plan.transformer
    rollout = Rollout(program, instantiate(program))
    encoder = TextEncoder(plan.folder, program.geometry.text_tokens)
    runtime = rollout._runtime
    with torch.no_grad():
        for name, page in rollout.pages.items():
            page[:, slots[0]] = before[name][:, slots[0]]
        runtime.set_prompt(encoder.encode([prompt]))
        for chunk in (3, 4):
            older = [slots[other] for other in slots if other < chunk]
            positions = torch.arange(2.0, dtype=torch.float64) + 2 * chunk
            runtime.commit(latents[chunk], positions, older, slots[chunk])
    for name, page in rollout.pages.items():
        for slot in table.table:
            assert torch.equal(page[:, slot], after[name][:, slot]), name
        if name.endswith("1"):
            assert not torch.equal(page[:, slots[4]], before[name][:, slots[4]])


def test_a_recached_chunk_stays_where_it_was_in_time(pipeline: Path) -> None:
    """Chunk 2 belongs to the shot before the cut, so it keeps the offset of that shot.

    The first layer's keys follow from latents and positions alone, so a recache keeps their bits.
    """
    stream, _ = opened(planned(pipeline, "stream.shot_offset=1.5"))
    with stream:
        for _ in range(4):
            next(stream.session)
        slots, before = stream.session.table.slots, cached(stream)
        assert sorted(slots.keys() - stream.session.table.sinks()) == [2]
        stream.switch("a green star falling", recache=True)
        report = next(stream.session)
        after = cached(stream)
    assert report.chunk.shot == 1 and "recache" in report.graphs
    held = slots[2]
    assert torch.equal(after["k_pages_0"][:, held], before["k_pages_0"][:, held])
    assert not torch.equal(after["k_pages_1"][:, held], before["k_pages_1"][:, held])


# Prompt switches


CUTLESS = [SHOTS[0], Shot(caption="a red square moving left", seconds=3, cut=False)]


def run(stream: Stream) -> list[ChunkReport]:
    with stream:
        return list(stream)


def test_receipts(plan: StreamPlan) -> None:
    """An event applies at the next chunk, to the end of the shot.

    Of several, the last one holds.
    """
    stream, _ = opened(plan)
    reports = []
    with stream:
        while stream.session.timeline.chunks:
            if stream.session.timeline.index == 1:
                first = stream.switch("a green star falling")
                second = stream.switch("a green star rising", recache=True)
                assert (first.received, first.applied) == (1, None)
            reports.append(next(stream.session))
    assert [len(report.chunk.receipts) for report in reports] == [0, 2, 0, 0, 0, 0]
    applied = tuple(replace(receipt, applied=1) for receipt in (first, second))
    assert reports[1].chunk.receipts == applied and reports[1].chunk.recache
    assert [report.chunk.prompt for report in reports] == [
        "a red circle moving left",
        *["a green star rising"] * 2,
        "The scene transitions. a blue square moving up",
        *["a blue square moving up"] * 2,
    ]
    assert "the prompt is empty" in refused(opened(plan)[0].switch, " ")


@pytest.mark.parametrize("place", ["_encode", "_runtime.set_prompt", "_runtime.commit"])
def test_a_switch_outlives_a_failure(
    plan: StreamPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    """The failure is before its first passes. The next attempt, or a restored session, shows it."""
    prompt = "a green star falling"

    def switch(stream: Stream, chunk: int) -> None:
        if chunk == 2:
            stream.switch(prompt, recache=True)

    def fail(*arguments: object) -> None:
        raise MemoryError

    (wanted, _), (other, _) = streamed(plan, act=switch), streamed(plan)
    assert not torch.equal(other, wanted)
    stream, _ = opened(plan)
    with stream:
        first = [next(stream.session).latents for _ in range(2)]
        switch(stream, 2)
        with monkeypatch.context() as patch:
            *path, name = place.split(".")
            patch.setattr(attrgetter(".".join(["session", *path]))(stream), name, fail)
            with pytest.raises(MemoryError):
                next(stream.session)
        if place == "_runtime.commit":
            assert "chunk 2 was interrupted" in refused(stream.save, tmp_path / "state")
        else:
            stream.save(tmp_path / "state")
            again, _ = opened(plan, (), resume=tmp_path / "state")
            with again:
                rest = [report.latents for report in again]
            assert torch.equal(torch.cat([*first, *rest], 2), wanted)
        reports = list(stream)
    assert len(reports[0].chunk.receipts) == 1 and reports[0].chunk.prompt == prompt
    assert torch.equal(torch.cat([*first, *(report.latents for report in reports)], 2), wanted)


def test_a_prompt_that_was_half_taken_is_not_taken_for_the_one_before(
    plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime holds the new one's keys and values when a switch back brings the old one."""
    wanted, _ = streamed(plan, SHOTS[:1])
    stream, _ = opened(plan, SHOTS[:1])
    with stream:
        reports = [next(stream.session) for _ in range(2)]
        take = stream.session._runtime.set_prompt
        stream.switch("a green star falling")
        with monkeypatch.context() as patch:
            patch.setattr(stream.session._runtime, "set_prompt", lambda text: (take(text), 1 / 0))
            with pytest.raises(ZeroDivisionError):
                next(stream.session)
        stream.switch(reports[0].chunk.prompt)
        reports += stream
    assert torch.equal(torch.cat([report.latents for report in reports], dim=2), wanted)


def test_a_prompt_that_failed_half_way_is_taken_back(
    plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that it wrote already are committed again under the prompt that holds."""
    stream, _ = opened(plan)
    with stream:
        for _ in range(2):
            prompt = next(stream.session).chunk.prompt
        before = cached(stream)
        stream.switch("a green star falling", recache=True)
        with monkeypatch.context() as patch:
            patch.setattr(stream.session._cache, "recache", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                next(stream.session)
        stream.switch(prompt, recache=False)
        report = next(stream.session)
        after = cached(stream)
    assert report.chunk.prompt == prompt and "recache" in report.graphs
    slots = [slot for chunk, slot in stream.session.table.slots.items() if chunk < 2]
    assert slots and all(torch.equal(before[n][:, slots], after[n][:, slots]) for n in before)


def test_a_cut_renews_no_page(pipeline: Path) -> None:
    """A cut in the script does not, though the prompt changes after its first chunk."""
    stream, _ = opened(planned(pipeline, "stream.recache=true"))
    assert all("recache" not in report.graphs for report in run(stream))
    stream, _ = opened(planned(pipeline, "stream.recache=true"))
    with stream:
        for _ in range(2):
            next(stream.session)
        slots, before = stream.session.table.slots, cached(stream)
        stream.session.timeline.cut("a green star falling", 2)
        report = next(stream.session)
        after = cached(stream)
    assert report.chunk.opens_shot and report.chunk.receipts and "recache" not in report.graphs
    for name, page in before.items():
        held = list(slots.values())
        assert torch.equal(after[name][:, held], page[:, held]), name
    stream, _ = opened(planned(pipeline, "stream.recache=true"), CUTLESS)
    assert [report.chunk.index for report in run(stream) if "recache" in report.graphs] == [3]


def test_a_switch_during_a_chunk_waits_for_the_next(plan: StreamPlan) -> None:
    stream, _ = opened(plan)
    encode, received = stream.session._encode, []

    def switching(text: str) -> Tensor:  # while a chunk is under way
        if text == SHOTS[0].caption:
            received.append(stream.switch("a green star"))
        return encode(text)

    stream.session._encode = switching
    with stream:
        reports = list(stream)
    assert received[0].received == 1 and reports[1].chunk.receipts[0].applied == 1


def test_blocks_may_be_compiled(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_blocks, compiled = ProgramModule.compile_blocks, []

    def quickly(module: ProgramModule) -> None:
        compile_blocks(module, backend="aot_eager")
        compiled.append(module)

    monkeypatch.setattr(ProgramModule, "compile_blocks", quickly)
    plain, plan = planned(pipeline), planned(pipeline, "stream.compile=true")
    assert "blocks compiled" in describe(plan)["transformer"]
    assert "compiled" not in describe(plain)["transformer"]
    wanted, _ = streamed(plain)
    assert not compiled
    latents, _ = streamed(plan)
    assert len(compiled) == 1 and (latents - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_a_script_switches_without_a_cut(pipeline: Path) -> None:
    """It gives what a live switch at the same chunk gives. With a cut the video is another."""
    later = CUTLESS[1]
    for recache in ("true", "false"):
        plan = planned(pipeline, f"stream.recache={recache}", "stream.shot_offset=2")
        scripted, _ = streamed(plan, CUTLESS)

        def act(stream: Stream, chunk: int) -> None:
            if chunk == 3:
                stream.switch(later.caption)

        whole = SHOTS[0].model_copy(update={"seconds": 6.0})
        live, _ = streamed(plan, [whole], act)
        assert torch.equal(scripted, live)
        cut, _ = streamed(plan, [SHOTS[0], later.model_copy(update={"cut": True})])
        assert torch.equal(cut[:, :, :6], live[:, :, :6]) and not torch.equal(cut, live)


# First frames


def test_the_first_latent_is_the_image_s(plan: StreamPlan, tmp_path: Path) -> None:
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    levels = (torch.rand(32, 64, 3, generator=generator) * 255).to(torch.uint8)
    Image.fromarray(levels.numpy()).save(tmp_path / "first.png")
    image, note = read_image(tmp_path / "first.png", 32, 64)
    assert note is None
    assert torch.allclose(image[0].permute(1, 2, 0) * 127.5 + 127.5, levels.float(), atol=1e-3)
    vae = wan_vae.load_vae(plan.folder)
    wanted = wan_vae.encode_image(wan_vae.make_vae(vae.config or {}, vae.weights), image)
    seen = []

    stream, _ = opened(plan, image=image)
    step = stream.session._runtime.step

    def watched(latents: Tensor, timestep: Tensor, *rest: object) -> Tensor:
        seen.append((latents[:, :, :1].clone(), timestep.clone()))
        return step(latents, timestep, *rest)  # type: ignore[arg-type]

    stream.session._runtime.step = watched  # type: ignore[method-assign]
    with stream:
        latents = [next(stream.session).latents for _ in range(2)]
    assert torch.equal(latents[0][:, :, :1], wanted)
    for first, timestep in seen[:4]:
        assert torch.equal(first, wanted)
        assert timestep[0, 0] == 0 and timestep[0, 1] > 0
    for first, timestep in seen[4:]:
        assert not torch.equal(first, wanted)
        assert timestep[0, 0] == timestep[0, 1] > 0
    without, _ = streamed(plan)
    assert not torch.equal(without[:, :, 1:2], latents[0][:, :, 1:2])


def test_every_item_of_a_batch_has_its_first_frame(pipeline: Path) -> None:
    """Each is what a stream of its own gives, up to the rounding of other products."""
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 64).view(2, 3, 32, 64)
    shot = [Shot(caption="a red circle moving left", seconds=1)]
    plans = [planned(pipeline, f"stream.seed={seed}") for seed in (3, 4)]
    alone = [
        streamed(each, shot, image=image)[0]
        for each, image in zip(plans, images.split(1), strict=True)
    ]
    batch = planned(pipeline, "geometry.batch=2", "stream.seed=3")
    both, _ = streamed(batch, shot, image=images)
    wanted = torch.cat(alone)
    assert float((both - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert float((both.flip(0) - wanted).abs().max() / wanted.abs().max()) > 0.1


def test_images_of_another_aspect_or_none_at_all(tmp_path: Path) -> None:
    from PIL import Image

    wide = Image.new("RGB", (100, 20), "blue")
    wide.paste((255, 0, 0), (30, 0, 70, 20))
    wide.save(tmp_path / "wide.png")
    image, note = read_image(tmp_path / "wide.png", 32, 64)
    assert image.shape == (1, 3, 32, 64)
    assert note is not None and "100×20" in note and "cropped about the centre to 40×20" in note
    assert float(image[:, 0].mean()) > 0.9, "red is the centre"
    (tmp_path / "text.png").write_text("not an image")
    assert "text.png: is not an image" in refused(read_image, tmp_path / "text.png", 32, 64)
    whole = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    assert "half.png: is not an image" in refused(read_image, tmp_path / "half.png", 32, 64)


# Save and resume


@pytest.mark.parametrize(("at", "new_process"), [(0, False), (2, False), (5, True)])
def test_resumed_bit_for_bit(pipeline: Path, tmp_path: Path, at: int, new_process: bool) -> None:
    """One switch is in force and one waits. There is guidance, recaching and a first frame."""
    overrides = ["stream.guidance=1.5", "stream.recache=true", "stream.shot_offset=1"]
    plan = planned(pipeline, *overrides)
    script = [*SHOTS, SHOTS[0].model_copy(update={"cut": False})]
    image = torch.linspace(-1, 1, 3 * 32 * 64).view(1, 3, 32, 64)

    def act(stream: Stream, chunk: int) -> None:
        if chunk <= at and chunk in (1, at):
            stream.switch(f"a green star falling {chunk}")

    whole, video = streamed(plan, script, act, image=image)
    stream, before = opened(plan, script, image=image)
    with stream:
        for chunk in range(at):
            act(stream, chunk)
            next(stream.session)
        act(stream, at)
        stream.save(tmp_path / "state")
    files = [str(file) for file in (pipeline, tmp_path / "state", tmp_path / "rest")]
    if new_process:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, streams.__file__, *files, *overrides]
        subprocess.run(command, check=True, env=environment)
    else:
        streams.resume(*files, *overrides)
    rest = load_file(tmp_path / "rest")
    assert torch.equal(rest["latents"], whole[:, :, 2 * at :])
    assert torch.equal(torch.cat([*before, rest["video"]], dim=2), video)


def test_a_state_lacking_a_part_goes_on_otherwise(plan: StreamPlan) -> None:
    """So the comparison above sees each of them."""
    whole, video = streamed(plan)
    stream, _ = opened(plan)
    with stream:
        for _ in range(4):
            next(stream.session)
        state = stream.session.state()
    for lost in ("pages", "caches"):
        held = {"pages": state.pages[0], "caches": state.delivery.caches}
        part = {name: tensor.clone() for name, tensor in held[lost].items()}
        part["k_pages_1" if lost == "pages" else "cache_3"].zero_()
        changed = (
            replace(state, pages=[part])
            if lost == "pages"
            else replace(state, delivery=replace(state.delivery, caches=part))
        )
        other, rest = opened(plan, ())
        other.session.restore(changed)
        with other:
            latents = torch.cat([report.latents for report in other], dim=2)
        same = torch.equal(latents, whole[:, :, 8:])
        assert same == (lost == "caches")
        assert not torch.equal(torch.cat(rest, 2), video[:, :, -16:])


def test_a_full_disk_loses_no_latent(plan: StreamPlan, tmp_path: Path) -> None:
    """What the sink did not take is in the state."""
    _, video = streamed(plan)
    got: list[Tensor] = []

    def sink(part: Tensor) -> None:
        if len(got) == 5:
            raise OSError("disk full")
        got.append(part)

    stream = open_stream(plan, sink, SHOTS)
    with pytest.raises(OSError, match="disk full"), stream:
        try:
            for _ in stream:
                pass
            stream.close()
        except OSError:
            stream.save(tmp_path / "state")
            raise
    other, rest = opened(plan, (), resume=tmp_path / "state")
    assert other.session.delivery.frame == sum(part.shape[2] for part in got)
    assert not rest, "decoding waits for its block"
    run(other)
    assert torch.equal(torch.cat([*got, *rest], dim=2), video)


def test_the_last_latents_are_owed_after_the_script(plan: StreamPlan, tmp_path: Path) -> None:
    _, video = streamed(plan, SHOTS[:1])
    got: list[Tensor] = []

    def sink(part: Tensor) -> None:
        if len(got) == 5:
            raise OSError("disk full")
        got.append(part)

    stream = open_stream(plan, sink, SHOTS[:1])
    with stream:
        for _ in range(3):
            next(stream.session)
        with pytest.raises(OSError, match="disk full"):
            stream.close()
        stream.save(tmp_path / "state")
    other, rest = opened(plan, (), resume=tmp_path / "state")
    assert not other.session.timeline.chunks and other.session.delivery.undelivered == 4
    other.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "state").read_bytes()
    assert not run(other)
    assert torch.equal(torch.cat([*got, *rest], dim=2), video)


def test_other_states_are_refused(pipeline: Path, plan: StreamPlan, tmp_path: Path) -> None:
    state = tmp_path / "state"
    stream, _ = opened(plan)
    with stream:
        next(stream.session)
        stream.save(state)
    assert "no such file" in refused(opened, plan, (), resume=tmp_path / "none")
    other = planned(pipeline, "stream.steps=3")
    message = refused(opened, other, (), resume=state)
    assert "another model, recipe or version (steps: 4 there, 3 here)" in message
    other = planned(save_pipeline(tmp_path / "other", seed=1))
    message = refused(opened, other, (), resume=state)
    assert "transformer: " in message and "decoder: " in message
    other_version = {**identity(plan), "lltk": "9.0"}
    assert "lltk: 0.1.0 there, 9.0 here" in refused(load_state, state, other_version)
    for content in (state.read_bytes()[:-100], b"", b"{}"):
        (tmp_path / "damaged").write_bytes(content)
        assert "it is damaged or was changed" in refused(load_state, tmp_path / "damaged", {})
    weights = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    assert "not a stream's state" in refused(load_state, weights, {})
    for stated in ("1", '{"format": "2"}'):
        save_tensors(tmp_path / "older", {"t": torch.ones(1)}, {"lltk.stream": stated})
        message = refused(load_state, tmp_path / "older", other_version)
        assert "not a stream's state of format 4" in message


def test_a_state_that_contradicts_its_plan_is_refused(plan: StreamPlan) -> None:
    stream, _ = opened(plan)
    with stream:
        for _ in range(5):
            next(stream.session)
        state = stream.session.state()
    timeline, cache, delivery = state.timeline, state.cache, state.delivery
    (chunk, *_), (first, *others), (pages,) = timeline.chunks, cache.held, state.pages
    slots, clean = cache.table["slots"], first.clean
    assert len(slots) == 3 and delivery.latents == 10
    video = torch.zeros(1, 3, 4, *plan.size)

    def listing(slots: list[tuple[int, int]]) -> SessionState:
        return replace(state, cache=replace(cache, table={**cache.table, "slots": slots}))

    def delivering(**changes: object) -> SessionState:
        return replace(state, delivery=replace(delivery, **changes))  # type: ignore[arg-type]

    short = replace(timeline, chunks=(replace(chunk, frames=range(3)),))
    cut = replace(cache, held=(replace(first, clean=clean[:, :, 1:]), *others))
    wrong = {
        "chunk 5 has frames 0 to 3;": replace(state, timeline=short),
        "is in page 4, and there are 4;": listing([*slots[:-1], (4, 4)]),
        "2 chunks are held before chunk 5;": listing(slots[:-1]),
        "12 latent frames were made before chunk 5;": delivering(latents=12),
        "it has 2 caches;": replace(state, pages=[pages, pages]),
        "cache: k_pages_0 is missing, or is one too many;": replace(
            state, pages=[{n: page for n, page in pages.items() if n != "k_pages_0"}]
        ),
        "its latents are torch.float32 [1, 4, 1, 2, 4];": replace(state, cache=cut),
        "latents to decode are torch.float64 [": delivering(undecoded=[clean.double()]),
        "more latents are to be decoded than were made;": delivering(undecoded=[clean] * 6),
        "its image is torch.float32 [1, 4, 2, 2, 4];": replace(state, image=clean),
        "video to deliver is torch.float32 [1, 3, 4, 16, 64];": delivering(
            undelivered=[video[:, :, :, :16]]
        ),
        "more video is to be delivered than was decoded;": delivering(undelivered=[video] * 11),
        "decoder: cache_0 is torch.float32 [1];": delivering(
            caches={**delivery.caches, "cache_0": torch.zeros(1)}
        ),
    }
    path = Path("state")
    check_state(path, state, plan)
    for said, other in wrong.items():
        message = refused(check_state, path, other, plan)
        assert message.startswith("state: ") and said in message, message


def test_the_sink_cannot_wait_for_itself(plan: StreamPlan, tmp_path: Path) -> None:
    """It is told at once, and the stream goes on."""
    said: list[str] = []

    def sink(video: Tensor) -> None:
        for act in (lambda: stream.save(tmp_path / "state"), stream.close):
            said.append(refused(act))

    stream = open_stream(plan, sink, SHOTS)
    with stream:
        assert len(list(stream)) == 6
        stream.save(tmp_path / "state")
    assert len(said) > 6 and all("the sink cannot save" in message for message in said)


def test_an_interrupted_chunk_is_not_saved(
    plan: StreamPlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stream, _ = opened(plan)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with stream:
        next(stream.session)
        monkeypatch.setattr(stream.session._runtime, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(stream.session)
        message = refused(stream.save, tmp_path / "state")
    assert "chunk 1 was interrupted" in message
    assert not (tmp_path / "state").exists()


# Resources


def test_memory_stays_the_same(plan: StreamPlan) -> None:
    """The tensors that live are counted, over a long stream."""
    script = [Shot(caption=f"a red circle moving left {i % 2}", seconds=4) for i in range(15)]
    stream = open_stream(plan, lambda video: None, script)

    def held() -> tuple[int, int]:
        stream.session.state()  # waits for the decoder
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is Tensor]
        return len(tensors), sum(tensor.nbytes for tensor in tensors)

    with stream:
        seen = [held() for count, _ in enumerate(stream) if count in (10, 30, 50)]
    assert len(set(seen)) == 1


def test_a_report_adds_up(plan: StreamPlan) -> None:
    stream, _ = opened(plan)
    for index, report in enumerate(run(stream)):
        assert report.chunk.index == index
        assert {"step", "commit"} <= report.graphs.keys()
        assert ("prologue" in report.graphs) == (index in (0, 3, 4))
        parts = report.text + sum(report.graphs.values()) + report.waited + report.outside
        assert abs(parts - report.seconds) < 1e-6
        assert 0 < report.outside < report.seconds
        assert report.pages == min(index, 3)
        assert report.decoding.keys() == {"decode", "deliver"}


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_values_that_are_not_finite_stop_it(pipeline: Path, guidance: float) -> None:
    """The error names chunk, pass and layer. What was delivered before stays."""
    plan = planned(pipeline, f"stream.guidance={guidance}")
    stream, video = opened(plan)
    with stream:
        next(stream.session)
        module = stream.session._runtime._module  # type: ignore[attr-defined]
        with torch.no_grad():
            module.get_parameter("blocks.1.ffn.net.2.weight").fill_(3e38)
        message = refused(next, stream.session)
    assert message.startswith("chunk 1, pass 0: ")
    assert "(blocks.1" in message and "is not finite" in message
    assert sum(part.shape[2] for part in video) == 5
