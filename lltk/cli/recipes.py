"""Finding a recipe by path or by the name of a shipped one."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from lltk.graph.recipe import Recipe, load_recipe


def shipped() -> dict[str, Path]:
    """The recipes that come with lltk, by name."""
    folder = Path(str(files("lltk.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def open_recipe(name: str, overrides: tuple[str, ...]) -> Recipe:
    """A recipe file, or a shipped recipe by name.

    Raises:
        ValueError: there is neither.
    """
    return load_recipe(find_recipe(name), overrides)


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or, if shipped, by name; errors as `open_recipe`'s."""
    path = Path(name)
    if path.exists():
        return path
    known = shipped()
    stem = path.stem if path.parent == Path(".") or path.parent.name == "recipes" else name
    if stem in known:
        return known[stem]
    near = get_close_matches(stem, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(known)}"
    raise ValueError(f"{name}: no such recipe file; {hint}")
