"""Program directories: what is saved comes back, and nothing changed or foreign is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lltk.artefact import load_program, save_program
from lltk.compiler import transform, with_weights
from lltk.graph.program import Program
from lltk.graph.recipe import open_recipe
from lltk.graph.text import print_graph

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def program() -> Program:
    """A small stream program with weights of two dtypes."""
    small = ("model.config={num_attention_heads: 2, attention_head_dim: 12, in_channels: 4, "
             "out_channels: 4, text_dim: 8, freq_dim: 8, ffn_dim: 16, num_layers: 2}")  # fmt: skip
    recipe = open_recipe("tiny_stream", (small, "geometry.height=64", "geometry.width=64"))
    made = transform(recipe, weights=False)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape, generator=generator).to(
            torch.bfloat16 if "ffn" in name else torch.float32
        )
        for name, tensor in made.weights.items()
    }
    return with_weights(made, weights)


@pytest.fixture
def saved(program: Program, tmp_path: Path) -> Path:
    save_program(program, tmp_path / "program")
    return tmp_path / "program"


def test_round_trip(program: Program, saved: Path) -> None:
    back = load_program(saved)
    assert (back.stage, back.kind, back.spec, back.geometry, back.recipe, back.log) == (
        program.stage,
        program.kind,
        program.spec,
        program.geometry,
        program.recipe,
        program.log,
    )
    for (name, ours), (other, theirs) in zip(
        back.every_graph(), program.every_graph(), strict=True
    ):
        assert name == other
        assert print_graph(ours, name) == print_graph(theirs, name)
    assert back.weights.keys() == program.weights.keys()
    for name, weight in program.weights.items():
        assert back.weights[name].dtype == weight.dtype
        assert torch.equal(back.weights[name], weight)


def test_saving_over_a_program_replaces_it(program: Program, saved: Path) -> None:
    (saved / "weights.safetensors").write_bytes(b"")
    save_program(program, saved)
    load_program(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_other_folders_are_left_alone(program: Program, tmp_path: Path) -> None:
    for folder in (tmp_path / "own", tmp_path / "program"):
        if folder.name == "program":
            save_program(program, folder)
        folder.mkdir(exist_ok=True)
        (folder / "notes.txt").write_text("mine")
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(ValueError, match="exists, and lltk did not write it as a Program"):
            save_program(program, folder)
        assert sorted(path.name for path in folder.iterdir()) == before
        save_program(program, folder, overwrite=True)
        assert not (folder / "notes.txt").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "graphs/step_block.txt", "program.json"])
def test_a_changed_file_is_refused(saved: Path, name: str) -> None:
    path = saved / name
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"7" + content[middle + 1 :])
    with pytest.raises(ValueError, match=r"was changed|damaged") as error:
        load_program(saved)
    assert name in str(error.value)


def test_a_missing_file_is_refused(saved: Path) -> None:
    (saved / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights.safetensors: is missing"):
        load_program(saved)


def test_another_format_is_refused(saved: Path) -> None:
    path = saved / "program.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="is of format 99, this lltk reads 4"):
        load_program(saved)


def test_a_folder_that_is_no_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no program\.json, so it is not a Program"):
        load_program(tmp_path)


def test_other_graphs_than_were_saved_are_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lltk.artefact

    changed = lambda graph, name: print_graph(graph, name) + "# another version\n"  # noqa: E731
    monkeypatch.setattr(lltk.artefact, "print_graph", changed)
    with pytest.raises(ValueError, match="give another graph 'prologue'; it was made with"):
        load_program(saved)
