"""`lltk train`: an autoencoder, then transformers on its latents, in diffusers' layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import Run

from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import shipped
from lltk.models.tiny.text import save_text_encoder
from lltk.models.wan_vae import load_vae
from lltk.training import open_training, plan_training

pytestmark = pytest.mark.cpu

AUTOENCODER = {
    "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2,
    "scale_factor_spatial": 16, "base_dim": 4, "decoder_base_dim": 4, "z_dim": 16,
    "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16,
}  # fmt: skip
VAE = [
    f"vae.config={json.dumps(AUTOENCODER)}", "vae.frames=5", "vae.batch=2", "train.batch=2",
    "train.steps=3", "train.ema_start=1", "train.validate_every=2", "train.sample_every=2",
    "train.checkpoint_every=2",
]  # fmt: skip
TRANSFORMER = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
    "text_dim": 64, "freq_dim": 16, "ffn_dim": 16, "num_layers": 1,
}  # fmt: skip
SMALL = [
    f"model.config={json.dumps(TRANSFORMER)}", "geometry.frames=6", "geometry.batch=2",
    "train.data.clips=2", "train.data.shots=2",
    "train.batch=4", "train.steps=2", "train.checkpoint_every=1", "train.validate_every=2",
]  # fmt: skip


def sets(values: list[str]) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def test_autoencoder_then_transformer(run: Run, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel

    code, out, err = run("train", "tiny_vae", *sets(VAE), "-o", tmp_path, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "the weights are in" in out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["validation"]["loss"] > 0 and not lines[0]["validation"]
    assert (tmp_path / "samples" / "step_00000002" / "reconstructions.mp4").stat().st_size > 1000
    vae = AutoencoderKLWan.from_pretrained(tmp_path / "vae")
    assert len(vae.config.latents_mean) == 16 and len(set(vae.config.latents_std)) > 1

    save_text_encoder(tmp_path)
    options = [*sets([*SMALL, f"train.data.pipeline={tmp_path}"]), "--device", "cpu"]
    for kind in ("train", "reference"):
        folder = tmp_path / kind
        code, out, err = run("train", f"tiny_{kind}", *options, "-o", folder, "--json")
        assert code == 0, err
        assert json.loads(out) == {"steps": 2, "weights": str(folder / "transformer")}
        model = DiffusionPipeline.from_pretrained(folder / "pipeline").transformer
        assert model.config.num_layers == 1

    more = ["--set", "train.steps=3", "--resume"]
    code, out, err = run("train", "tiny_train", *options, "-o", tmp_path / "train", *more)
    assert code == 0, err
    assert "teacher_forcing" in out and "Kept" not in out
    resumed = WanTransformer3DModel.from_pretrained(tmp_path / "train" / "transformer")
    other = WanTransformer3DModel.from_pretrained(tmp_path / "reference" / "transformer")
    assert not torch.equal(resumed.proj_out.weight, other.proj_out.weight)
    lines_ = (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines_] == [1, 2, 3]

    code, _, err = run("train", "tiny_train", *options, "-o", tmp_path / "train")
    assert code == 2
    assert "holds a run; resume it" in " ".join(err.split())


def test_an_autoencoder_in_low_precision_has_float32_masters(tmp_path: Path) -> None:
    data = read_recipe(shipped()["tiny_vae"], [*VAE, "vae.dtype=bfloat16", "train.steps=1"])
    for key in ("validate_every", "sample_every"):
        data["train"][key] = None
    plan = plan_training(data)
    with open_training(plan, tmp_path) as run:
        objective = run.objective
        started = {name: weight.clone() for name, weight in objective.weights.items()}
        for metrics in run:
            assert metrics.step == 1
    module = dict(objective.module.named_parameters())
    assert {parameter.dtype for parameter in module.values()} == {torch.bfloat16}
    moved = 0
    weights = run.trainer.weights
    for name, master in weights.items():
        assert master.dtype == started[name].dtype == torch.float32
        assert torch.equal(module[name], master.bfloat16())
        moved += int((master != started[name]).sum())
    assert moved > sum(master.numel() for master in weights.values()) / 2
    assert any(not torch.equal(master, master.bfloat16()) for master in weights.values())
    assert {weight.dtype for weight in load_vae(run.export()).weights.values()} == {torch.float32}


@pytest.mark.parametrize("recipe", ["tiny_vae", "tiny_train", "tiny_reference"])
def test_plans(run: Run, recipe: str) -> None:
    small = [] if recipe == "tiny_vae" else sets(SMALL)
    code, out, _ = run("train", recipe, *small, "--dry-run", "--json", "--set", "train.steps=7")
    assert code == 0
    plan = json.loads(out)
    assert plan["train"]["steps"] == 7 and plan["weights"] == "random"
    memory = plan["memory"]
    assert memory["AdamW moments"] == 2 * memory["gradients"] == 2 * memory["average"] > 0
    code, out, _ = run("train", recipe, *small, "--dry-run")
    assert code == 0 and "AdamW moments" in out
    assert "Weights to begin with: random" in out


def test_random_weights_are_asked_for(run: Run) -> None:
    line = ["train", "tiny_train", *sets([*SMALL, "train.from_scratch=false"]), "--dry-run"]
    assert run(*line)[0] == 2
    assert run(*line, "--from-scratch")[0] == 0


def test_what_passes_convert_and_keep_is_printed(run: Run) -> None:
    config = json.dumps(TRANSFORMER | {"attention_head_dim": 16})
    small = sets([*SMALL, f"model.config={config}", "passes.nvfp4_train.keep_last=0"])
    line = ["train", "tiny_train_nvfp4", *small, "--dry-run", "--device", "cpu"]
    code, out, err = run(*line)
    assert code == 0, err
    assert "1 ffn.net.2" in out and "excluded by" in out and "blocks.0.attn1.to_q" in out
    (entry,) = (e for e in json.loads(run(*line, "--json")[1])["log"] if e["kept"])
    assert entry["name"] == "nvfp4_train" and entry["stage"] == "quantised"
    assert any("blocks.0.attn1.to_q" in kept for kept in entry["kept"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["tiny_train", "--set", "train.stps=1"],
            "train: unknown key 'stps'; did you mean",
        ),
        (["tiny_stream"], "has no train section"),
        (["wan22_5b_train"], "has no train section"),
        (
            ["tiny_train", *sets([*SMALL, "train.from_scratch=false"])],
            "model.checkpoint: names no weights to begin with; set model.checkpoint=PATH, or begin",
        ),
        (
            ["tiny_train", "--from-scratch", *sets(["model.checkpoint=x"])],
            "--from-scratch: the recipe names model.checkpoint",
        ),
        (
            ["tiny_train", *sets(["model.checkpoint=some/one"])],
            "model.checkpoint: some/one is not here; check the path or, if it is on the",
        ),
        (
            ["tiny_train", *sets([*SMALL, "train.data.pipeline=null"])],
            "pipeline: names no folder",
        ),
        (
            ["tiny_train", *sets([*SMALL, "train.data.pipeline=nowhere"])],
            "nowhere: no such pipeline",
        ),
        (
            ["tiny_train_nvfp4", "--set", "passes.lower.nvfp4_linear=scaled_mm", "--device", "cpu"],
            "nvfp4_linear: scaled_mm runs on cuda, not on cpu; cpu has reference: set",
        ),
        (["tiny_train", "--set", "geometry.batch=3"], "the nearest that fit: 63 and 66"),
        (["tiny_train", "--set", "train.data.frames=28"], "frames: 28 latent frames, but the"),
        (["tiny_train", "--set", "train.data.frames=12"], "multiple of 3 that is at least 15"),
        (["tiny_train", "--set", "train.data.shots=10"], "shots: 10 do not fit into a clip of 9"),
        (["tiny_train", "--set", "train.betas=[0.9,1]"], "betas.1: Input should be less than 1"),
        (["tiny_vae", "--set", "vae.frames=6"], "the nearest that fit: 5 and 9"),
        (["tiny_vae", "--set", "vae.config=tiny_vea"], "did you mean 'tiny_vae'?"),
        (["tiny_vae", "--set", "train.compile=true"], "train.compile: is for transformers"),
        (
            ["tiny_vae", "--set", "train.data.clips=9"],
            "train.data.clips: an autoencoder trains on new",
        ),
        (
            ["tiny_vae", "--set", "train.data.encoding=whole"],
            "train.data.encoding: an autoencoder trains on new",
        ),
    ],
)
def test_bad_input_is_refused(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, _, err = run("train", *arguments, "-o", tmp_path / "run")
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_divergence_ends_with_one(run: Run, tmp_path: Path) -> None:
    changes = [*VAE, "train.lr=1e30", "train.warmup=0", "train.steps=20"]
    code, _, err = run("train", "tiny_vae", *sets(changes), "-o", tmp_path, "--device", "cpu")
    assert code == 1
    text = " ".join(err.split())
    assert "the loss is nan" in text and "first not finite: " in text
    assert not (tmp_path / "vae").exists()


def test_help_has_an_example(run: Run) -> None:
    code, out, _ = run("train", "--help")
    assert code == 0
    assert "lltk train tiny_vae" in out.split("Example:")[1]


def test_a_plan_says_what_would_fit(run: Run) -> None:
    """With the largest blocks' activations far above the rest, fewer bits and more ranks do."""
    base = ["train", "tiny_train_sp2", "--dry-run", "--json", "--device", "cpu"]
    base += ["--set", "geometry.batch=64", "--set", "train.batch=64", "--set", "train.graphs=false"]
    plain = json.loads(run(*base)[1])
    assert plain["fits"]["as_is"] and plain["fits"]["ways"] == []
    needed = sum(plain["memory"].values())
    _, out, _ = run(*base, "--device-memory", str(0.8 * needed / 2**30))
    fits = json.loads(out)["fits"]
    assert not fits["as_is"] and fits["available"] == pytest.approx(0.8 * needed, abs=1)
    assert len(fits["ways"]) == 3 and "train.offload=true" in fits["ways"][1]
    for way in fits["ways"]:
        changes = way.split(":")[0].split(", ")[-1].split()
        _, out, _ = run(*base, *changes)
        assert sum(json.loads(out)["memory"].values()) <= 0.8 * needed, way
    _, out, _ = run(*base, "--device-memory", "1e-6")
    assert json.loads(out)["fits"]["ways"] == []
    for endless in ("nan", "inf", "1e400"):
        code, _, err = run(*base, "--device-memory", endless)
        assert code == 2 and "is no finite number" in err
    code, _, err = run("train", "tiny_train", "-o", "x", "--device-memory", "80")
    assert code == 2 and "--dry-run" in err
