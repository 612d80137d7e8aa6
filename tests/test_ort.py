"""Streams that ONNX Runtime plays from a bundle, against torch's by the same recipe."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import SCENES, Exported, bundle_plan, image, with_section
from helpers import Run, refused
from streams import SHOTS, opened, streamed
from torch import Tensor

from lltk.graph.contract import Role
from lltk.stream.denoise import denoise
from lltk.stream.positions import frame_positions
from lltk.stream.rollout import RuntimeRollout
from lltk.stream.runtimes import Runtime
from lltk.stream.sampler import Schedule
from lltk.stream.video import levels
from lltk.streaming import Models, open_decoder, open_runtime, plan_bundle

pytestmark = pytest.mark.cpu


def grey_levels(ours: Tensor, theirs: Tensor) -> int:
    """The largest difference of two videos, in levels of 0 to 255."""
    assert ours.shape == theirs.shape
    return int((levels(ours).int() - levels(theirs).int()).abs().max())


@pytest.mark.parametrize("scene", SCENES)
def test_a_bundle_makes_torchs_video(exported: Exported, scene: str) -> None:
    latents, video = SCENES[scene](bundle_plan(exported))
    wanted, wanted_video = exported.torchs(scene)
    assert (latents - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert grey_levels(video, wanted_video) <= 1


def test_the_scenes_differ(exported: Exported) -> None:
    plain = exported.torchs("plain")[1]
    for scene in ("switched", "guided", "image"):
        video = exported.torchs(scene)[1]
        assert grey_levels(video, plain[:, :, : video.shape[2]]) > 10, scene


def test_a_saved_stream_goes_on_bit_for_bit(exported: Exported, tmp_path: Path) -> None:
    plan = bundle_plan(exported)
    whole, whole_video = streamed(plan)
    stream, begun = opened(plan)
    with stream:
        first = torch.cat([next(stream).latents for _ in range(3)], dim=2)
        stream.save(tmp_path / "state.safetensors")
    again, rest = opened(plan, (), resume=tmp_path / "state.safetensors")
    with again:
        last = torch.cat([report.latents for report in again], dim=2)
    assert torch.equal(torch.cat([first, last], dim=2), whole)
    video = torch.cat([*begun, *rest], dim=2)
    assert torch.equal(video, whole_video)


def test_sessions_over_one_bundle_do_not_meet(exported: Exported) -> None:
    models = Models(bundle_plan(exported))
    alone = []
    for seed in (1, 2):
        with models.open(lambda video: None, SHOTS[:1], seed=seed) as stream:
            alone.append(torch.cat([report.latents for report in stream], dim=2))
    with (
        models.open(lambda video: None, SHOTS[:1], seed=1) as one,
        models.open(lambda video: None, SHOTS[:1], seed=2) as two,
    ):
        pairs = [(next(one).latents, next(two).latents) for _ in range(3)]
    both = [torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True)]
    assert all(map(torch.equal, both, alone)) and not torch.equal(*both)


@pytest.fixture(scope="module")
def runtime(exported: Exported) -> Runtime:
    return open_runtime(bundle_plan(exported))


def given(runtime: Runtime, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents and positions of a chunk."""
    geometry, spec = runtime.geometry, runtime.spec
    shape = (1, spec.channels, geometry.chunk, *geometry.latent(spec))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return latents, torch.arange(geometry.chunk, dtype=torch.float64) + 7


def prompt(runtime: Runtime) -> Tensor:
    shape = (1, runtime.geometry.text_tokens, runtime.spec.text_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def test_a_commit_changes_its_page_alone_and_in_place(runtime: Runtime) -> None:
    runtime.clear()
    runtime.set_prompt(prompt(runtime))
    places = {name: page.data_ptr() for name, page in runtime.pages.items()}
    runtime.commit(*given(runtime), (), 1)
    before = {name: page.clone() for name, page in runtime.pages.items()}
    runtime.commit(*given(runtime, 1), (1,), 3)
    for name, page in runtime.pages.items():
        assert torch.equal(page[:, :3], before[name][:, :3]), name
        assert page[:, 3].abs().max() > 0.1 and not page[:, [0, 2]].any(), name
    assert {name: page.data_ptr() for name, page in runtime.pages.items()} == places


def test_listed_pages_are_read_and_others_are_not(runtime: Runtime) -> None:
    runtime.clear()
    runtime.set_prompt(prompt(runtime))
    latents, positions = given(runtime)
    for slot in (0, 2):
        runtime.commit(*given(runtime, slot + 1), (), slot)
    time = torch.full((1, runtime.geometry.chunk), 500.0)

    def step(*table: int) -> Tensor:
        return runtime.step(latents, time, positions, table)

    both, one = step(2, 0), step(0)
    assert (both - one).abs().max() > 1e-3
    torch.testing.assert_close(step(0, 2), both, rtol=0, atol=0)
    for page in runtime.pages.values():
        page[:, 2] = torch.nan
    torch.testing.assert_close(step(0), one, rtol=0, atol=0)
    assert runtime.first_bad(latents, time, positions, (0,)) is None
    assert runtime.first_bad(latents, time, positions, (0, 2)) == "output sample of step"
    with pytest.raises(AssertionError, match="are not different ones of"):
        step(0, 0)
    assert "k_pages_0 has values that are not finite" in refused(runtime.state)


def test_what_is_not_finite_is_named(exported: Exported) -> None:
    plan = bundle_plan(exported)
    shape = (1, plan.geometry.text_tokens, plan.spec.text_dim)

    def spoilt(text: str) -> Tensor:
        return torch.full(shape, torch.nan if "blue" in text else 0.1)

    stream, _ = opened(plan, prompts=spoilt)
    with stream:
        message = refused(list, stream)
    assert message.startswith("chunk 3, pass 0: output cross_k_0 of prologue is not finite; ")
    runtime = open_runtime(plan)
    runtime.set_prompt(spoilt("red"))
    latents, positions = given(runtime)
    runtime.commit(latents * torch.nan, positions, (), 1)
    bad = runtime.first_bad_commit(latents, positions, (), 1, runtime.magnitudes(1))
    assert bad == "output new_k_pages_0 of commit"


def test_states_of_others_are_refused(exported: Exported, tmp_path: Path) -> None:
    plan = bundle_plan(exported)
    stream, _ = opened(plan)
    with stream:
        next(stream)
        stream.save(tmp_path / "state")
    other = with_section(plan, shift=3.0)
    assert "shift" in refused(opened, other, (), resume=tmp_path / "state")
    runtime = open_runtime(plan)
    pages = {name: page[:, :2] for name, page in runtime.pages.items()}
    assert "are not this program's" in refused(runtime.restore, pages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("geometry.height=64", "geometry.height: is built into "),
        ("stream.decoder.latents=2", "stream.decoder.latents: is built into "),
        ("model.lora=a.safetensors", "export the recipe again with --set model.lora=a.safetensors"),
        ("stream.compile=true", "stream.compile: is for torch, and ONNX Runtime plays"),
        ("stream.decoder.device=cuda", "stream.decoder.device: is for torch, and ONNX Runtime"),
        ("stream.stepz=2", "stream.stepz: is built into "),
        ("stream.text.device=cuda", "has its text encoder, for the CPU; drop the key"),
        ("stream.steps=0", "steps: Input should be greater than or equal to 1"),
    ],
)
def test_what_is_built_in_cannot_change(exported: Exported, change: str, message: str) -> None:
    assert message in refused(plan_bundle, exported.bundle, [change])


def test_another_text_encoder_is_refused(exported: Exported, tmp_path: Path) -> None:
    """Where the bundle has none."""
    plan = plan_bundle(exported.outside, [f"stream.pipeline={tmp_path / 'moved'}"])
    message = refused(opened, plan)
    assert "has no text_encoder/; name a pipeline's folder" in message
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / "other" / part).mkdir(parents=True)
        for file in (exported.pipeline / part).iterdir():
            (tmp_path / "other" / part / file.name).write_bytes(file.read_bytes())
    same = [f"stream.pipeline={tmp_path / 'other'}"]
    plan_bundle(exported.outside, same).text_encoder(None).encode(["a red circle"])
    config = tmp_path / "other" / "text_encoder" / "config.json"
    config.write_text(config.read_text() + " ")
    encoder = plan_bundle(exported.outside, same).text_encoder(None)
    assert "holds another text encoder than the one" in refused(encoder.encode, ["a red circle"])


def test_an_image_needs_the_pipelines_vae(exported: Exported, tmp_path: Path) -> None:
    """All else plays without the pipeline."""
    plan = bundle_plan(exported, f"stream.pipeline={tmp_path / 'moved'}")
    message = refused(opened, plan, SHOTS[:1], image=image())
    assert message.startswith(f"image: {tmp_path / 'moved'} has no vae/, ")
    latents, _ = streamed(plan)
    assert torch.equal(latents, streamed(bundle_plan(exported))[0])


def test_embeddings_are_kept(exported: Exported, tmp_path: Path) -> None:
    """And are read again, be the encoder in the bundle or outside."""
    for path in (exported.bundle, exported.outside):
        plan, cache, text = plan_bundle(path), tmp_path / path.name, ["a red circle"]
        made = plan.text_encoder(cache).encode(text)
        encoder = plan.text_encoder(cache)
        encoder._run = None  # type: ignore[method-assign,assignment]
        assert torch.equal(encoder.encode(text), made)


def test_providers_are_refused_by_name(exported: Exported) -> None:
    for name, message in {
        "CUDAExecutionProvider": "pip uninstall onnxruntime && pip install onnxruntime-gpu",
        "cuda": "--provider: cuda is none of CPUExecutionProvider, CUDAExecutionProvider",
    }.items():
        assert message in refused(plan_bundle, exported.bundle, provider=name)


CODE = """
import json, sys
from lltk.cli.main import cli
cli.main(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted(sys.modules)))
"""


def test_a_bundle_needs_no_diffusers_and_no_graph_of_torchs(
    exported: Exported, tmp_path: Path
) -> None:
    line = ["stream", str(exported.bundle), "--prompt", "a red circle", "--seconds", "1"]
    line += ["-o", str(tmp_path / "v.mp4"), "--json"]
    made = subprocess.run(
        [sys.executable, "-c", CODE, *line], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    modules = set(json.loads(made.stdout.splitlines()[-1]))
    assert {"onnxruntime", "tokenizers"} <= modules and (tmp_path / "v.mp4").exists()
    heavy = {
        "diffusers", "transformers", "lltk.compiler", "lltk.passes", "lltk.graph.capture",
        "lltk.graph.module", "torch._dynamo", "torch._inductor",
    }  # fmt: skip
    assert not modules & heavy


def test_the_commands(run: Run, exported: Exported, tmp_path: Path) -> None:
    where, output = str(exported.bundle), tmp_path / "v.mp4"
    line = ("stream", where, "--prompt", "a red circle", "--seconds", "2")
    code, out, err = run(*line, "-o", output, "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["refusal"] == "" and not output.exists(), err
    assert plan["plan"]["bundle"] == where and "CPUExecutionProvider" in plan["plan"]["decoder"]
    assert plan["memory"]["cpu"]["cache pages"] > 0
    code, out, err = run(*line, "-o", output, "--seed", "3", "--steps", "2", "--json")
    assert code == 0 and json.loads(out)["frames"] == 13, err
    for more, message in {
        ("--device", "cpu"): "is a bundle; use --provider, such as CUDAExecutionProvider",
        ("--lora", "x.safetensors"): "model.lora: is built into",
    }.items():
        code, _, err = run(*line, "-o", tmp_path / "w.mp4", *more)
        assert code == 2 and message in " ".join(err.split())
    code, _, err = run("stream", "tiny_stream", "--prompt", "a", "--provider", "x")
    assert code == 2 and "--provider: is for a bundle, and tiny_stream is none" in err
    record = tmp_path / "record"
    line = ("bench", "stream", where, "--seconds", "1", "--runs", "1", "--warmup", "1")
    code, out, err = run(*line, "-o", record)
    (result,) = json.loads(record.with_suffix(".json").read_text())["results"]
    assert code == 0 and "CPUExecutionProvider" in result["ran"]["transformer"], err
    assert result["name"] == "bundle" and result["dit_fps"] > 0
    code, _, err = run(*line, "-o", record, "--random-weights")
    assert code == 2 and "--random-weights: " in err and "which has its own" in err


def test_a_bundle_is_compared_with_its_recipe(exported: Exported) -> None:
    base, other = exported.said("compare")["results"]
    assert set(base["errors"]) == {"blocks.0", "blocks.1", "output"}
    assert set(other["errors"]) == {"output"} and 0 < other["errors"]["output"] < 1e-5


def test_the_pages_example_plays_a_bundle(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without lltk, as printed; chunks enough that some are evicted."""
    page = Path(__file__).parents[1] / "docs" / "export.md"
    play, encode = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[-2:]
    monkeypatch.chdir(tmp_path)
    Path("bundle").symlink_to(exported.bundle)
    exec(encode, {})
    assert set(re.findall(r"^import (\w+)", play, re.MULTILINE)) == {
        "json", "numpy", "onnxruntime",
    }  # fmt: skip
    exec(play, {})
    text = torch.from_numpy(np.load("embedding.npy"))
    plan = bundle_plan(exported)
    run, decoder = RuntimeRollout(open_runtime(plan)), open_decoder(plan)
    run.set_text(text)
    draw, video = np.random.default_rng(0), []
    size = plan.contract("transformer", "step").input(Role.LATENTS).shape
    for chunk in range(6):
        noise = torch.from_numpy(draw.standard_normal(size, dtype=np.float32))
        positions = frame_positions([0], 2, first=chunk)
        clean = denoise(Schedule.make(4), noise, run.velocity(positions))
        run.commit(clean, positions, chunk == 0)
        video.append(decoder.decode(clean))
    made = torch.from_numpy(np.load("video.npy")).permute(3, 0, 1, 2)[None]
    wanted = levels(torch.cat(video, dim=2))
    assert (made.int() - wanted.int()).abs().max() <= 1 and len(run.table.slots) == 3
    assert (wanted[:, :, -8:].int() - wanted[:, :, -16:-8].int()).abs().max() > 10
