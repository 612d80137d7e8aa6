"""Finding a recipe by path or by the name of a shipped one."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib.resources import files
from itertools import takewhile
from pathlib import Path


def shipped() -> dict[str, Path]:
    """The recipes that come with lltk, by name."""
    folder = Path(str(files("lltk.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def sentence(recipe: Path) -> str:
    """What a recipe is for: the first sentence of the comment that it begins with."""
    lines = takewhile(lambda line: line.startswith("#"), recipe.read_text("utf-8").splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"(?<=\.) ", comment)[0]


def find_recipe(name: str, folder: Path = Path()) -> Path:
    """The file of a recipe given by path or, if shipped, by name; a folder is no recipe.

    Args:
        name: a path, or a shipped recipe's name.
        folder: what a path is relative to.

    Raises:
        ValueError: there is neither.
    """
    path = folder / name
    if path.exists() and not path.is_dir():
        return path
    known, given = shipped(), Path(name)
    stem = given.stem if given.parent == Path() or given.parent.name == "recipes" else name
    if stem in known:
        return known[stem]
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the file of a recipe")
    near = get_close_matches(stem, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(known)}"
    raise ValueError(f"{path}: no such recipe file; {hint}")
