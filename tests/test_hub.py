"""Names of the Hugging Face hub where a path is wanted, against a faked hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import Run, refused
from huggingface_hub.errors import LocalEntryNotFoundError
from streams import SIZES, save_pipeline

from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import shipped
from lltk.models.checkpoint import load_checkpoint
from lltk.models.hub import on_disk
from lltk.models.pipelines import find_pipeline
from lltk.stream.video import read_video

pytestmark = pytest.mark.cpu

OURS, LORA = "someone/a-pipeline", "someone/adapters/lora.safetensors"


class Hub:
    """Stands in for the functions that download; a cache that is empty at first."""

    def __init__(self, folder: Path) -> None:
        self.held = {OURS: folder, LORA: folder / "lora.safetensors"}
        self.cache: set[str] = set()
        self.downloads: list[str] = []

    def snapshot_download(self, repository: str, local_files_only: bool = False) -> str:
        return self.fetch(repository, local_files_only)

    def hf_hub_download(self, repository: str, file: str, local_files_only: bool = False) -> str:
        return self.fetch(f"{repository}/{file}", local_files_only)

    def fetch(self, name: str, local_files_only: bool) -> str:
        if name not in self.cache:
            if local_files_only:
                raise LocalEntryNotFoundError("not in the cache")
            if name not in self.held:
                raise OSError("404 Client Error: Repository Not Found\nmore lines")
            self.downloads.append(name)
            self.cache.add(name)
        return str(self.held[name])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(save_pipeline(tmp_path / "pipeline"))
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", getattr(made, name))
    monkeypatch.chdir(tmp_path)
    return made


def named(**names: Any) -> dict[str, Any]:
    return {"model": {"checkpoint": None, "lora": None, **names}, "stream": {"pipeline": OURS}}


def test_a_recipe_gets_paths(hub: Hub) -> None:
    recipe = named(lora=LORA)
    made = on_disk(recipe, download=True)
    folder = hub.held[OURS]
    assert made["stream"]["pipeline"] == str(folder)
    assert made["model"] == {"checkpoint": None, "lora": str(folder / "lora.safetensors")}
    assert hub.downloads == [LORA, OURS]
    listed = on_disk(named(lora=["mine", LORA]), download=False)  # as --lora names them
    assert listed["model"]["lora"] == ["mine", made["model"]["lora"]]
    assert recipe == named(lora=LORA), "the recipe is left as it is"
    assert on_disk(recipe, download=False) == made, "the cache is looked into"
    assert on_disk({"vae": {}, "train": {"data": None}}, download=True).keys() == {"vae", "train"}
    assert len(hub.downloads) == 2


def test_what_is_not_here_says_what_to_run(hub: Hub, tmp_path: Path) -> None:
    said = refused(on_disk, named(checkpoint=LORA), download=False)
    assert said == (
        f"model.checkpoint: {LORA} is not here; check the path or, if it is on the Hugging Face "
        "hub, run `hf download someone/adapters lora.safetensors`, or add --download"
    )
    assert f"run `hf download {OURS}`" in refused(find_pipeline, OURS)
    assert on_disk(named(), download=False, needed=False) == named()
    (tmp_path / OURS).mkdir(parents=True)
    assert on_disk(named(), download=True) == named() and not hub.downloads


def test_what_the_hub_does_not_have_is_refused(hub: Hub) -> None:
    recipe = named(checkpoint="some/thing")
    said = refused(on_disk, recipe, download=True)
    assert on_disk(named(checkpoint="a..b/c"), download=False, needed=False)["model"]["checkpoint"]
    assert said.startswith("model.checkpoint: some/thing cannot be downloaded (404 Client Error: ")
    assert "\n" not in said


def test_a_stream_of_a_repository(hub: Hub, run: Run, tmp_path: Path) -> None:
    changes = [part for key in (*SIZES, f"stream.pipeline={OURS}") for part in ("--set", key)]
    line = ["stream", "tiny_stream", "--prompt", "a circle", "--seconds", 1, *changes]
    line += ["--device", "cpu", "-o", tmp_path / "v.mp4"]
    code, _, err = run(*line)
    assert code == 2 and f"hf download {OURS}" in " ".join(err.split())
    code, _, err = run(*line, "--download")
    assert code == 0, err
    assert len(read_video(tmp_path / "v.mp4")) == 5 and hub.downloads == [OURS]


@pytest.mark.parametrize(
    "command", ["bench stream tiny_stream", "compare tiny_stream tiny_stream --shots 0"]
)
def test_measuring_a_repository(hub: Hub, run: Run, command: str) -> None:
    changes = [part for key in (*SIZES, f"stream.pipeline={OURS}") for part in ("--set", key)]
    line = [*command.split(), *changes, "--device", "cpu", "-o", "record"]
    code, _, err = run(*line)
    assert code == 2 and f"hf download {OURS}" in " ".join(err.split())
    assert hub.downloads == []
    run(*line, "--download", "--dry-run")
    assert hub.downloads == [OURS]


def test_what_python_names_is_looked_for_in_the_cache(hub: Hub) -> None:
    said = refused(load_checkpoint, OURS)
    assert "does not exist; check the path or, if it is on the" in said
    assert f"run `hf download {OURS}`" in said
    on_disk(named(), download=True)
    assert load_checkpoint(OURS).weights.keys() == load_checkpoint(hub.held[OURS]).weights.keys()
    assert load_checkpoint(Path(OURS)).weights


def test_the_5b_recipes_name_their_repository() -> None:
    for name, path in shipped().items():
        if name.startswith("wan22_5b_stream"):
            pipeline = read_recipe(path)["stream"]["pipeline"]
            assert pipeline == "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
