"""`lltk stream`: the files it writes, how it is stopped and goes on, what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import Run, refused
from streams import SIZES, opened, planned
from torch import Tensor

from lltk.cli.stream_prompts import jobs
from lltk.files.locks import held
from lltk.graph.memory import activations, readable, total
from lltk.graph.recipe import Recipe, open_recipe
from lltk.stream.video import VideoWriter, pixels, read_video
from lltk.streaming import StreamPlan, memory, plan_stream, stream_memory

pytestmark = pytest.mark.cpu


SCRIPT = """\
- caption: a red circle moving left
  seconds: 2.6
- caption: a blue square moving up
  seconds: 2
- caption: a blue square turning
  seconds: 1
  cut: false
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "shots.yaml"
    path.write_text(SCRIPT)
    return path


def sets(pipeline: Path, *overrides: str) -> list[str]:
    changes = [*SIZES, f"stream.pipeline={pipeline}", *overrides]
    return [part for change in changes for part in ("--set", change)]


@pytest.fixture
def run(run: Run, monkeypatch: pytest.MonkeyPatch, pipeline: Path, tmp_path: Path) -> Run:
    """Run the command; exit code, output, errors. Equal plans are made once."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def plan(recipe: Recipe, device: torch.device, **options: object) -> StreamPlan:
        assert recipe.stream is not None
        given = [
            f"stream.{key}={json.dumps(value)}"
            for key, value in recipe.stream.items()
            if key != "decoder"
        ]
        return planned(pipeline, *given)

    monkeypatch.setattr("lltk.streaming.plan_stream", plan)

    def call(*arguments: object) -> tuple[int, str, str]:
        code, out, err = run(*arguments, "--device", "cpu")
        return code, out, " ".join(err.split())

    return call


def test_a_script_becomes_a_video_and_a_contact_sheet(
    run: Run, pipeline: Path, script: Path, tmp_path: Path
) -> None:
    from PIL import Image

    files = ["-o", tmp_path / "a" / "video.mp4", "--contact-sheet", tmp_path / "b" / "shots.png"]
    code, out, err = run("stream", "tiny_stream", "--script", script, *files, *sets(pipeline))
    assert code == 0, err
    for said in ("shot 1: 2.6 s asked, 2.62 s made (21 frames, chunks: 3)", "paged_attention sdpa",
                 "decoder: cpu, float32, passes canonicalise", "E2E FPS", "first frame",
                 "share of the time (they overlap): outside", "45 (5.62 s)"):  # fmt: skip
        assert said in out, out
    video = read_video(tmp_path / "a" / "video.mp4")
    assert video.shape == (45, 32, 64, 3)
    stream, wanted = opened(planned(pipeline), script=_script(script))
    with stream:
        list(stream)
    with VideoWriter(tmp_path / "same.mp4", 32, 64, 8) as writer:
        for part in wanted:
            writer.write(pixels(part))
    assert torch.equal(video, read_video(tmp_path / "same.mp4"))
    assert Image.open(tmp_path / "b" / "shots.png").size == (6 * 64, 3 * (18 + 32))


def _script(path: Path) -> object:
    from lltk.stream.script import load_script

    return load_script(path)


def test_prompts_are_shots_in_a_file_of_another_form(run: Run, pipeline: Path) -> None:
    """Without -o the file has the recipe's name, and a number where that is taken."""
    prompts = ["--prompt", "a red circle", "--prompt", "a blue square", "--seconds", 1]
    for name in ("tiny_stream.mp4", "tiny_stream_2.mp4"):
        code, out, err = run("stream", "tiny_stream", *prompts, *sets(pipeline))
        assert code == 0, err
        assert "shot 2: 1 s asked, 1.00 s made" in out
        assert len(read_video(Path(name))) == 13
    code, _, err = run("stream", "tiny_stream", *prompts, *sets(pipeline), "-o", "frames")
    assert code == 0, err
    assert len(list(Path("frames").glob("frame_*.png"))) == 13


PROMPTS = "a red circle\n\na blue square, moving up\na red circle\n"
VIDEOS = [f"{prompt}-{n}.mp4" for prompt in sorted({*PROMPTS.splitlines()} - {""}) for n in (0, 1)]


def test_many_prompts(run: Run, pipeline: Path, tmp_path: Path) -> None:
    """A video a prompt and seed, as a stream of that prompt and seed makes it; others go on."""
    file, folder = tmp_path / "prompts.txt", tmp_path / "videos"
    file.write_text(PROMPTS)
    options = ["--prompts", file, "--seeds", 2, "--seconds", 1, "--seed", 3, "-o", folder]
    code, out, err = run("stream", "tiny_stream", *options, *sets(pipeline))
    assert code == 0, err
    assert "4 of 4 videos made" in out
    assert sorted(path.name for path in folder.iterdir()) == VIDEOS
    alone = ["--prompt", "a red circle", "--seconds", 1, "--seed", 4, "-o", tmp_path / "one.mp4"]
    assert run("stream", "tiny_stream", *alone, *sets(pipeline))[0] == 0
    assert (tmp_path / "one.mp4").read_bytes() == (folder / VIDEOS[3]).read_bytes()
    assert (folder / VIDEOS[2]).read_bytes() != (folder / VIDEOS[3]).read_bytes()

    made = {name: (folder / name).stat().st_mtime_ns for name in VIDEOS}
    whole = (folder / VIDEOS[1]).read_bytes()
    (folder / VIDEOS[1]).unlink()
    (folder / ".unfinished.mp4").write_bytes(b"of a run that was killed")
    code, out, err = run("stream", "tiny_stream", *options, *sets(pipeline), "--json")
    assert code == 0, err
    assert json.loads(out) == {"folder": str(folder), "videos": 4, "made": 1}
    assert (folder / VIDEOS[1]).read_bytes() == whole
    assert all(
        (folder / name).stat().st_mtime_ns == made[name] for name in VIDEOS if name != VIDEOS[1]
    )
    assert sorted(path.name for path in folder.iterdir()) == VIDEOS
    with held(folder, tmp_path / "videos.lock"):
        code, _, err = run("stream", "tiny_stream", *options, *sets(pipeline))
    assert code == 2 and "videos: is in use by process" in err
    code, _, err = run("stream", "tiny_stream", *options[:-4], "-o", folder, *sets(pipeline))
    assert code == 2 and "its videos were made otherwise: recipe.stream.seed was " in err


def test_many_prompts_stop_between_chunks(run: Run, pipeline: Path, tmp_path: Path) -> None:
    file, folder, write = tmp_path / "prompts.txt", tmp_path / "videos", VideoWriter.write
    file.write_text(PROMPTS)

    def stopping(self: VideoWriter, frames: Tensor) -> None:
        write(self, frames)
        if (folder / VIDEOS[2]).exists():
            os.kill(os.getpid(), signal.SIGTERM)

    options = ["--prompts", file, "--seconds", 9, "--seeds", 2, "-o", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoWriter, "write", stopping)
        code, _, err = run("stream", "tiny_stream", *options, *sets(pipeline))
    assert code == 1 and "stopped; whole videos are in" in err
    assert VIDEOS[2] in (left := {path.name for path in folder.iterdir()})
    assert left <= {VIDEOS[2], ".unfinished.mp4"}


def test_a_prompt_that_no_file_can_be_named_after(tmp_path: Path) -> None:
    for prompt in ("and/or", "x" * 240):
        assert "names a video, and no file can have that name" in refused(
            jobs, [prompt], 1, tmp_path
        )


def test_json_and_a_dry_run(run: Run, pipeline: Path, tmp_path: Path) -> None:
    what = ["stream", "tiny_stream", "--prompt", "a red circle", "--seconds", 2, *sets(pipeline)]
    code, out, err = run(*what, "--json", "-o", tmp_path / "video.mp4", "--steps", 2)
    assert code == 0, err
    result = json.loads(out)
    assert (result["chunks"], result["frames"]) == (2, 13)
    assert result["e2e_fps"] > 0 and result["first_frame_seconds"] > 0
    assert sum(result["share_of_wall"].values()) > 0.2
    assert result["state"] is None and not list(tmp_path.glob("*.safetensors"))
    code, out, _ = run(*what, "--json", "--dry-run", "--guidance", 3)
    assert code == 0
    plan = json.loads(out)
    assert "guidance 3" in plan["plan"]["sampler"]
    assert "second cache, for guidance" in plan["memory"]["cpu"]
    assert "cached_step" in [entry["name"] for entry in plan["log"]]
    assert plan["refusal"] == ""
    code, out, _ = run(*what, "--dry-run")
    assert code == 0 and "decoder: feature caches" in out and "cached_step" in out
    assert "It cannot run here" not in out
    code, out, _ = run(*what, "--dry-run", "--device", "cpu", "--set", "stream.cuda_graphs=true")
    assert code == 1 and "It cannot run here: stream.cuda_graphs: is for GPUs" in out
    assert len(list(tmp_path.iterdir())) == 1


def test_an_image_of_another_aspect_is_said(run: Run, pipeline: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (50, 50), "red").save(tmp_path / "red.png")
    options = ["--prompt", "a red circle", "--seconds", 1, "-o", tmp_path / "v.mp4"]
    image = ["--image", tmp_path / "red.png"]
    code, out, err = run("stream", "tiny_stream", *options, *image, *sets(pipeline))
    assert code == 0, err
    assert "cropped about the centre to 50×25" in out


# Stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_saved_stream_goes_on(
    run: Run, pipeline: Path, script: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A signal stops it after its second chunk. Both parts together are the whole video."""
    got: list[Tensor] = []
    write = VideoWriter.write

    def stopping(self: VideoWriter, frames: Tensor) -> None:
        write(self, frames)
        got.append(frames)
        if len(got) == 3:
            os.kill(os.getpid(), number)

    options = ["--script", script, "-o", tmp_path / "one.mp4", "--seed", 5, *sets(pipeline)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoWriter, "write", stopping)
        code, _, err = run("stream", "tiny_stream", *options)
    assert code == 1
    assert "stopped: " in err and "go on with: lltk stream tiny_stream" in err
    made = read_video(tmp_path / "one.mp4")
    assert 9 <= len(made) < 45
    command = shlex.split(err.partition("go on with: lltk ")[2])
    assert command[-4:] == [
        "--resume", str(tmp_path / "one.state.safetensors"), "-o", str(tmp_path / "one_rest.mp4"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoWriter, "write", lambda s, f: (write(s, f), got.append(f)))
        code, out, err = run(*command)
    assert code == 0, err
    assert f"going on at frame {len(made)}" in out
    stream, wanted = opened(planned(pipeline, "stream.seed=5"), script=_script(script))
    with stream:
        list(stream)
    assert torch.equal(torch.cat(got), torch.cat([pixels(part) for part in wanted]))
    code, _, err = run(*command)
    assert code == 2 and "exists, and a resumed stream's file holds the continuation" in err


STOPPED = """
import os, signal, sys
from pathlib import Path
from lltk.cli import stopping as module
module._SAME = -1.0
with module.stopping() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked
    if sys.argv[1] == "keeping":
        with stop.keeping():
            os.kill(os.getpid(), signal.SIGHUP)
            Path("kept").touch()
    else:
        os.kill(os.getpid(), signal.SIGHUP)
    Path("later").touch()
"""


@pytest.mark.parametrize("where", ["keeping", "elsewhere"])
def test_a_second_signal_ends_at_once_but_loses_no_state(tmp_path: Path, where: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-P", "-c", STOPPED, where],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert ended.returncode == 128 + signal.SIGHUP
    assert [path.name for path in tmp_path.iterdir()] == (["kept"] if where == "keeping" else [])


def test_a_full_disk(run: Run, pipeline: Path, tmp_path: Path) -> None:
    """What was written plays, and the message says how to go on."""
    from lltk.stream.video import _Disk

    write = _Disk.write

    def full(self: _Disk, data: bytes) -> int:
        if self.tell() > 6000:
            raise OSError(28, "No space left on device")
        return write(self, data)

    options = ["--prompt", "a red circle", "--seconds", 9, "-o", tmp_path / "one.mp4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Disk, "write", full)
        code, _, err = run("stream", "tiny_stream", *options, *sets(pipeline))
    assert code == 1
    assert "No space left on device" in err and "frames" in err
    assert len(read_video(tmp_path / "one.mp4")) >= 12
    command = shlex.split(err.partition("go on with: lltk ")[2])
    code, _, err = run(*command)
    assert code == 0, err
    assert len(read_video(tmp_path / "one_rest.mp4")) > 12


def test_a_disk_too_full_for_the_contact_sheet(
    run: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is kept before, and the video is whole."""

    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lltk.cli.outputs.contact_sheet", full)
    sheet, state = tmp_path / "sheet.png", tmp_path / "state"
    options = ["--prompt", "x", "--seconds", 1, "-o", tmp_path / "v.mp4", *sets(pipeline)]
    files = ["--contact-sheet", sheet, "--save", state]
    code, _, err = run("stream", "tiny_stream", *options, *files)
    assert code == 1 and state.is_file() and len(read_video(tmp_path / "v.mp4")) == 5
    assert "plays, 5 frames; the contact sheet is not written: No space left on device" in err


def test_a_disk_too_full_for_the_state(
    run: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lltk.stream.state.save_tensors", full)
    options = ["--prompt", "x", "--seconds", 1, "-o", tmp_path / "v.mp4", *sets(pipeline)]
    code, _, err = run("stream", "tiny_stream", *options, "--save", tmp_path / "state")
    assert code == 1
    assert "plays, 5 frames; the state is not kept: No space left on device" in err
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_a_killed_process_leaves_a_video_that_plays(pipeline: Path, tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    options = ["--prompt", "a red circle", "--seconds", 3000, "-o", video, "--device", "cpu"]
    arguments = ["lltk", "stream", "tiny_stream", *options, *sets(pipeline)]
    code = "import sys, torch; torch.set_num_threads(1); from lltk.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *map(str, arguments[1:])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (video.exists() and video.stat().st_size > 20_000):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert len(read_video(video)) >= 12


# Refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to stream: one of --script, --prompt, --prompts and --resume"),
        (["--prompt", "x", "--prompts", "y"], "name what to stream: one of"),
        (["--prompt", "x", "--seeds", "2"], "--seeds: is for --prompts; drop it"),
        (["--prompt", "x", "-o", "FOLDER/v.avi"], "a video cannot be written as .avi; use .mp4"),
        (["--prompt", "x", "-o", "FOLDER"], "is the folder you are in, or holds it"),
        (["--prompts", "SCRIPT", "-o", "SCRIPT"], "is a file; name a folder"),
        (["--prompts", "SCRIPT", "-o", "FOLDER"], "is not empty, and no videos of lltk"),
        (["--prompts", "SCRIPT", "--image", "x"], "--image: is for a single video"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--prompt", "x", "--script", "y"], "name what to stream: one of"),
        (["--prompt", " "], "prompt: caption: is empty"),
        (["--prompt", "x", "--seconds", "0"], "a shot cannot last 0 s"),
        (["--prompt", "x", "--set", "stream.stps=3"], "unknown key 'stps'; did you mean 'steps'?"),
        (["--script", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--resume", "nowhere"], "nowhere: cannot be read"),
        (["--prompt", "x", "--image", "nowhere.png"], "nowhere.png"),
        (["--prompt", "x", "--contact-sheet", "SCRIPT/sheet.png"], "sheet.png: cannot be written"),
        (["--prompt", "x", "--save", "FOLDER"], "cannot be written (it is a folder)"),
        (["--resume", "x", "--image", "y"], "a resumed stream has its first frame"),
        (["--resume", "x", "--seed", "1"], "a resumed stream has its own"),
        (["--prompt", "x", "--set", "stream.text.device=gpu"], "device: 'gpu' names none; write"),
        (["--prompt", "x", "--set", "stream.text.device=cuda:99"],
         "stream.text.device: cuda:99 is not here; there is cpu"),
        (["--prompt", "x", "--set", "stream.cuda_graphs=true", "--device", "cpu"],
         "stream.cuda_graphs: is for GPUs, not for cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_work(
    run: Run, pipeline: Path, script: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    own = [a.replace("SCRIPT", str(script)).replace("FOLDER", str(tmp_path)) for a in arguments]
    code, _, err = run("stream", "tiny_stream", "-o", tmp_path / "v.mp4", *own, *sets(pipeline))
    assert code == 2
    assert message in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["shots.yaml"]


def test_other_recipes_are_refused(
    run: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for recipe, overrides, message in (
        ("tiny_train", [], "program: train cannot be streamed"),
        ("tiny_stream", ["--set", "stream=null"], "has no stream section"),
        ("tiny_stream", ["--set", "stream.pipeline=nowhere"], "nowhere: no such pipeline folder"),
        ("tiny_stream", sets(pipeline, "model.config=tiny"), "^model.config: differs from"),
    ):
        monkeypatch.setattr(
            "sys.argv",
            ["lltk", "stream", recipe, "--prompt", "x", "-o", str(tmp_path / "v.mp4"), *overrides],
        )
        with pytest.raises(ValueError, match=message):
            from lltk.cli.main import cli

            cli.main(standalone_mode=False)


def test_too_little_memory(
    run: Run, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the sum, what is free, and what would fit."""
    plan = planned(pipeline, "stream.guidance=2", "stream.text.after=keep")
    owners = stream_memory(plan)["cpu"]
    need = total(owners)
    assert owners["activations"] == activations(plan.transformer) > 0
    smaller = stream_memory(planned(pipeline, "geometry.window=6"))["cpu"]
    pages = 2 * (owners["cache pages"] - smaller["cache pages"])  # of both caches
    options = ["--prompt", "x", "-o", tmp_path / "v.mp4", "--guidance", 2]
    options += sets(pipeline, "stream.text.after=keep")
    for free, fits in (
        (need - 1, "what would fit: geometry.window=6 ("),
        (need - pages, "what would fit: geometry.window=6 ("),
        (need - owners["text encoder"], "stream.text.after=free ("),
        (need - owners["text encoder"] - 1000, "geometry.window=6 with stream.text.after=free"),
        (owners["weights"], "its weights alone do not fit"),
    ):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        code, _, err = run("stream", "tiny_stream", *options)
        assert code == 2
        assert "memory: the stream needs" in err and fits in err, err
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(memory, "available", lambda device: need)
    assert run("stream", "tiny_stream", *options, "--seconds", 1)[0] == 0


def test_fewer_latents_at_once_would_fit(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the error proposes does fit."""
    keys = (*SIZES, f"stream.pipeline={pipeline}", "geometry.window=6")
    one, two = (
        plan_stream(open_recipe("tiny_stream", (*keys, f"stream.decoder.latents={n}")))
        for n in (1, 2)
    )
    need, less = (total(stream_memory(plan)["cpu"]) for plan in (two, one))
    monkeypatch.setattr(memory, "available", lambda device: less)
    memory.check_memory(one, image=False)
    message = refused(memory.check_memory, two, image=False)
    assert less < need and message.endswith(
        f"what would fit: stream.decoder.latents=1 ({readable(less)})"
    )


def test_ranks_that_decode_nothing_need_no_decoder(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(pipeline)
    owners = stream_memory(plan)["cpu"]
    decoder = sum(size for owner, size in owners.items() if owner.startswith("decoder"))
    monkeypatch.setattr(memory, "available", lambda device: total(owners) - decoder)
    monkeypatch.setattr(memory, "weight_bytes", lambda folder, dtype: 0)
    memory.check_memory(plan, image=False, rank=1)
    assert "decoder: weights" in refused(memory.check_memory, plan, image=False)


def test_encoders_count_before_the_stream(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts where it runs, and not beside what comes after.

    An image's counts if there is one.
    """
    plan, sizes = planned(pipeline), {"text_encoder": 1, "vae": 2}
    made = memory.loading_memory(plan, image=True)["cpu"]
    assert made.keys() == {"text encoder at work", "image encoder"} and min(made.values()) > 0
    monkeypatch.setattr(memory, "weight_bytes", lambda folder, dtype: sizes[folder.name])
    assert memory.loading_memory(plan, image=True) == {
        "cpu": {"text encoder at work": 1, "image encoder": 2}
    }
    memory.check_memory(plan, image=True)
    sizes["vae"] = 1 << 50
    memory.check_memory(plan, image=False)
    assert "image encoder 1048576.0 GiB" in refused(memory.check_memory, plan, image=True)
    sizes["text_encoder"] = 1 << 50
    message = refused(memory.check_memory, plan, image=False)
    assert "(text encoder at work 1048576.0 GiB)" in message
    assert "its weights alone do not fit" in message


def test_help_has_an_example(run: Run) -> None:
    code, out, _ = run("stream", "--help")
    assert code == 0
    assert "lltk stream tiny_stream --script" in out.split("Example:")[1]


def test_a_plan_without_weights_needs_the_decoders_configuration() -> None:
    recipe = open_recipe("tiny_stream", ("stream.decoder.config=null",))
    message = refused(plan_stream, recipe, weights=False)
    assert message.startswith("stream.decoder.config: name one; without weights")
