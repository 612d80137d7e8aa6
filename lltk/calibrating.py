"""Scales of activations, found while a stream runs, for ``activation_scale: calibrated``.

::

    scales = record_scales(open_recipe("tiny_stream_w4a4"), load_script(path))
    recipe = calibrated(read_recipe(path), scales)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lltk.compiler import transform
from lltk.graph.packed import ENDINGS
from lltk.graph.recipe import Recipe
from lltk.graph.weights import few
from lltk.models.checkpoint import Checkpoint
from lltk.ops.floats import E2M1_MAX, E4M3_MAX
from lltk.stream.report import ChunkReport
from lltk.stream.script import Shot
from lltk.streaming import open_stream, plan_stream
from lltk.streaming.torch_engine import TorchEngine

aten = torch.ops.aten
PASS = "nvfp4_infer"
"""The pass that the scales are for."""
_OPERANDS = {aten.linear.default: (0, 1), aten.addmm.default: (1, 2), aten.mm.default: (0, 1)}
"""Where products have their activation and their weight."""


def check_calibratable(recipe: Recipe) -> None:
    """Check that a recipe has linears whose scales can be calibrated.

    Raises:
        ValueError: it has no pass nvfp4_infer.
    """
    if PASS not in dict(recipe.steps()):
        raise ValueError(f"passes: have no {PASS}, which scales are for; name a recipe with it")


def check_scales(recipe: Recipe, checkpoint: Checkpoint, where: str) -> None:
    """Check that a checkpoint's scales are those of the linears that a recipe makes NVFP4.

    Args:
        recipe: of a stream, with the pass nvfp4_infer.
        checkpoint: has the scales, and the model's configuration where the recipe names none.
        where: what errors call the checkpoint.

    Raises:
        ValueError: a linear has no scale, or a scale has no linear; names them.
    """
    wanted = set(_quantised(recipe, recipe.model.config or checkpoint.config))
    found = checkpoint.input_scales.keys()
    said = []
    if lacking := sorted(wanted - found):
        said.append(f"has no scale of {few(lacking)}, which {PASS} makes NVFP4")
    if odd := sorted(found - wanted):
        said.append(f"has scales of {few(odd)}, which {PASS} does not make NVFP4")
    if said:
        raise ValueError(
            f"{where}: {', and '.join(said)}; change include or exclude of {PASS}, or record "
            "scales of this recipe with --script"
        )


def record_scales(
    recipe: Recipe,
    script: Sequence[Shot],
    device: torch.device | str = "cpu",
    note: Callable[[ChunkReport], None] = lambda report: None,
) -> dict[str, float]:
    """The scale of what each linear reads that the recipe makes NVFP4, by the linear's path.

    The recipe's stream runs without quantised linears. A scale is the largest magnitude / 2688,
    so that the largest is what codes and block scales can just say.

    Args:
        recipe: of a stream, with the pass nvfp4_infer.
        script: what it shows. Its shots are streamed once.
        device: where it runs.
        note: is told of each chunk.

    Raises:
        ValueError: the recipe has no such pass, its linears' inputs are all zeros or not finite, or
            another pass changes one of them where this pass does not.
    """
    check_calibratable(recipe)
    passes = [
        "lower" if _name(entry) == "lower" else entry  # what it prefers may not be there
        for entry in recipe.passes
        if _name(entry) != PASS
    ]
    stream = {**(recipe.stream or {}), "compile": False, "cuda_graphs": False}
    plan = plan_stream(
        recipe.model_copy(update={"passes": passes, "stream": stream}), device=device
    )
    wanted = _quantised(recipe, plan.transformer.recipe["model"]["config"])
    with open_stream(plan, lambda video: None, script) as running:
        engine = running.models.engine
        assert isinstance(engine, TorchEngine)
        found = _Largest(engine.parameters, wanted)
        with found:
            for report in running:
                note(report)
    return found.scales()


def _quantised(recipe: Recipe, config: Any) -> list[str]:
    """The linears that a recipe makes NVFP4, of a model that is configured."""
    model = recipe.model.model_copy(update={"config": config})
    passes = _with_options(recipe.passes, _DYNAMIC)
    program = transform(recipe.model_copy(update={"model": model, "passes": passes}), weights=False)
    ending = ENDINGS[0]
    return [name.removesuffix(ending) for name in program.weights if name.endswith(ending)]


class _Largest(TorchDispatchMode):
    """Notes the largest magnitude that products read beside each weight.

    Args:
        parameters: as they run, by name.
        modules: the paths of the linears to look at.

    Raises:
        ValueError: a linear's weight does not run.
    """

    def __init__(self, parameters: Mapping[str, Tensor], modules: Iterable[str]) -> None:
        super().__init__()
        modules = list(modules)
        if odd := [module for module in modules if f"{module}.weight" not in parameters]:
            raise ValueError(
                f"{odd[0]}: another pass changes it while the stream runs without {PASS}; exclude "
                "it from that pass, such as fp8_infer"
            )
        weights = {module: parameters[f"{module}.weight"] for module in modules}
        self._modules = {weight.data_ptr(): module for module, weight in weights.items()}
        self._largest = {
            module: torch.zeros((), device=weight.device) for module, weight in weights.items()
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _OPERANDS:
            x, weight = (args[index] for index in _OPERANDS[func])
            if (module := self._modules.get(weight.data_ptr())) is not None:
                largest = self._largest[module]
                torch.maximum(largest, x.abs().amax().float(), out=largest)
        return func(*args, **(kwargs or {}))

    def scales(self) -> dict[str, float]:
        """Of each linear."""
        made = {}
        for module, noted in self._largest.items():
            largest = float(noted)
            if not 0 < largest < math.inf:
                raise ValueError(
                    f"{module}: reads nothing but zeros, or what is not finite; record another "
                    "script, or exclude the module from nvfp4_infer"
                )
            made[module] = largest / (E2M1_MAX * E4M3_MAX)
        return made


_DYNAMIC: dict[str, Any] = {"activation_scale": "dynamic", "input_scales": {}}


def calibrated(data: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
    """A recipe's plain data, whole, with calibrated scales in the place of dynamic ones."""
    made = deepcopy(dict(data))
    options = {"activation_scale": "calibrated", "input_scales": dict(scales)}
    made["passes"] = _with_options(made["passes"], {**options, "activation_rule": "none"})
    return made


def _with_options(
    passes: Iterable[str | dict[str, Any]], options: Mapping[str, Any]
) -> list[str | dict[str, Any]]:
    """Passes, in which nvfp4_infer has other options."""
    made: list[str | dict[str, Any]] = []
    for entry in passes:
        if _name(entry) != PASS:
            made.append(entry)
            continue
        own = {} if isinstance(entry, str) else dict(entry[PASS] or {})
        made.append({PASS: {**own, **options}})
    return made


def _name(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else next(iter(entry))
