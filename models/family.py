"""What lltk knows of the models of one architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lltk.graph.geometry import Kind
from lltk.graph.program import Program
from lltk.graph.recipe import ModelSection, Recipe
from lltk.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Family:
    """Models of one architecture: how they are configured, read, built and captured.

    What passes may know of a captured model is its Program's spec, which ``capture`` makes.

    Attributes:
        name: what errors call such a model.
        kinds: kinds of Program that it becomes.
        options: keys of a recipe's ``model`` section that are for this family and not for others.
        configs: its configurations by name.
        validate: checks a configuration and fills in defaults; the second argument is what errors
            call it.
        load: reads the checkpoint that a ``model`` section names.
        build: makes the module of a configuration, initialised.
        capture: captures a configuration's model as a recipe's Program, with meta weights.
    """

    name: str
    kinds: tuple[Kind, ...]
    options: frozenset[str]
    configs: Mapping[str, Mapping[str, Any]]
    validate: Callable[[Mapping[str, Any], str], dict[str, Any]]
    load: Callable[[ModelSection], Checkpoint]
    build: Callable[[Mapping[str, Any]], nn.Module]
    capture: Callable[[Mapping[str, Any], Recipe], Program]
