"""Reading adapters: what files of LoRA trainers add to a transformer's weights.

A file holds low-rank pairs (``lora_A`` and ``lora_B``, or ``lora_down`` and ``lora_up``) and
differences (``diff``, ``diff_b``, ``w_norm``, …) of modules, under diffusers' or Wan's names, which
may have a prefix, or, with ``lora_unet_``, underscores for dots. The scale of a pair comes from the
first of these that there is:

1. the tensor ``<module>.alpha``: alpha / rank;
2. PEFT's ``adapter_config.json`` beside the file, or ``lora_adapter_metadata`` in its header:
   ``lora_alpha`` and ``r``, with their patterns and ``use_rslora``, as PEFT reads them;
3. ``alpha``, ``lora_alpha`` or ``ss_network_alpha`` in its header: alpha / rank;
4. otherwise it is 1.

A tensor that is neither, such as DoRA's magnitudes, is refused: without it the rest is another
adapter. (diffusers' own reader drops some of these, and needs every module of a block.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lltk.graph.low_rank import LowRank, add_changes
from lltk.graph.weights import few
from lltk.models.checkpoint import named_tensors, unwrapped
from lltk.models.hub import local
from lltk.models.layouts import WEIGHT_LAYOUTS
from lltk.models.nvfp4_conventions import parse_object
from lltk.models.weight_files import read_header, read_weights

_PREFIX = re.compile(
    r"^(?:(?:base_model|_forward_module|module|model|diffusion_model|transformer|pipe|dit)\.)+"
)
_JOINED = re.compile(r"lora_unet_+(?:blocks_(?P<block>\d+)_)?(?P<module>[^.]+)")
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.[^.]+(\.(?:weight|bias))$")
_ROLES = {
    ".lora_A.weight": "A",
    ".lora_down.weight": "A",
    ".lora.down.weight": "A",
    ".lora_B.weight": "B",
    ".lora_up.weight": "B",
    ".lora.up.weight": "B",
    ".lora_B.bias": "bias of B",
    ".alpha": "alpha",
    ".diff": "weight",
    ".w_norm": "weight",
    ".diff_b": "bias",
    ".b_norm": "bias",
    ".diff_m": "modulation",
}
_DORA = ("lora_magnitude_vector", "dora_scale")
_BY_HAND = "merge it into the checkpoint with the library that made it"
_PEFT = "adapter_config.json"
_DIFFUSERS = "lora_adapter_metadata"
_HEADER_ALPHAS = ("alpha", "lora_alpha", "ss_network_alpha")
_STEMS = ("adapter_model", "pytorch_lora_weights", "lora")
_OPTIONS = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
_IRRELEVANT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
"""Options of PEFT: how an adapter was trained, where from, and what its tensors say themselves."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Beginnings of ``init_lora_weights`` under which PEFT changes the base weights too."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds to a transformer's weights.

    Attributes:
        where: the file.
        changes: of each parameter, by its name: a low-rank product, or a difference of its shape.
    """

    where: str
    changes: Mapping[str, LowRank | Tensor]

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that it fits a model, whose parameters have these shapes.

        Raises:
            ValueError: the model lacks a parameter, or has it in another shape.
        """
        for name, change in self.changes.items():
            wanted, found = shapes.get(name), tuple(change.shape)
            if wanted != found:
                has = "does not have it" if wanted is None else f"has it as {wanted}"
                raise ValueError(
                    f"{self.where}: changes {name} of {found}, and the model {has}; use an adapter "
                    "that was trained for this model"
                )


def merge_adapters(
    weights: Mapping[str, Tensor], adapters: Iterable[tuple[Adapter, float]]
) -> dict[str, Tensor]:
    """Weights with adapters added.

    Args:
        weights: a state dict of the captured model.
        adapters: each with its strength, which multiplies all it adds. They fit the model.
    """
    changes: dict[str, list[tuple[LowRank | Tensor, float]]] = {}
    for adapter, strength in adapters:
        for name, change in adapter.changes.items():
            changes.setdefault(name, []).append((change, strength))
    merged = {name: add_changes(weights[name], listed) for name, listed in changes.items()}
    return dict(weights) | merged


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter.

    Args:
        path: a ``.safetensors`` file, or a ``.pt``, ``.pth`` or ``.bin`` file with a state dict or
            LongLive's ``generator_lora``; or a folder of PEFT, of diffusers or with one such file.

    Raises:
        ValueError: there is no such file, it is damaged, or it holds something that is no LoRA.
            Names the file and the key.
    """
    file = _file(local(path))
    content = read_weights(file)
    state = named_tensors(unwrapped(content.get("generator_lora", content), file), str(file))
    scaling = _scaling(file, state)
    parts = _parts(state, str(file))
    changes: dict[str, LowRank | Tensor] = {}
    for (parameter, role), part in parts.items():
        if role == "difference":
            changes[parameter] = part.tensor
        elif role in ("B", "alpha", "bias of B") and (parameter, "A") not in parts:
            raise ValueError(f"{file}: {part.key} has no lora_A beside it; download it again")
        elif role == "A":
            changes |= _pair(parameter, parts, scaling, str(file))
    if not changes:
        raise ValueError(f"{file}: holds no tensors; name the file of an adapter")
    return Adapter(str(file), changes)


def _pair(
    parameter: str, parts: Mapping[tuple[str, str], _Part], scaling: _Scaling, where: str
) -> dict[str, LowRank | Tensor]:
    """The changes of a module that a low-rank pair makes: of its weight, and maybe its bias."""
    down, up = parts[parameter, "A"], parts.get((parameter, "B"))
    if up is None:
        raise ValueError(f"{where}: {down.key} has no lora_B beside it; download it again")
    a, b, alpha = down.tensor, up.tensor, parts.get((parameter, "alpha"))
    fits = a.dim() > 1 and b.dim() > 1 and b.flatten(1).shape[1] == a.shape[0] > 0
    if not fits:
        raise ValueError(
            f"{where}: {down.key} is {tuple(a.shape)} and {up.key} is {tuple(b.shape)}; "
            "A is [rank, in] and B is [out, rank]; download it again"
        )
    names = (down.module, _PREFIX.sub("", down.module), parameter.removesuffix(".weight"))
    own = None if alpha is None else _number(alpha.tensor, f"{where}: {alpha.key}")
    pair = LowRank(a, b, scaling.of(names, a.shape[0], own))
    bias = parts.get((parameter, "bias of B"))
    if bias is None:
        return {parameter: pair}
    return {parameter: pair, parameter.removesuffix("weight") + "bias": pair.scale * bias.tensor}


@dataclass(frozen=True)
class _Part:
    """A tensor of a file: its key, and the module that the key names, as the file names it."""

    key: str
    module: str
    tensor: Tensor


def _parts(state: Mapping[str, Tensor], where: str) -> dict[tuple[str, str], _Part]:
    """A file's tensors by parameter and by role: A, B, bias of B, alpha or difference."""
    parts: dict[tuple[str, str], _Part] = {}
    for key, tensor in state.items():
        if any(part in key for part in _DORA):
            raise ValueError(
                f"{where}: {key} makes this a DoRA adapter, which lltk does not merge; {_BY_HAND}"
            )
        plain = _ADAPTER_NAME.sub(r"\1\2", key)
        role = next((ending for ending in _ROLES if plain.endswith(ending)), None)
        if role is None:
            if _is_parameter(plain) and not any(other.endswith(tuple(_ROLES)) for other in state):
                raise ValueError(
                    f"{where}: {key} is a weight of the whole model; the file holds no adapter: "
                    f"stream it with --set model.checkpoint={where}"
                )
            raise ValueError(
                f"{where}: {key} is no part of a LoRA (lora_A, lora_B, alpha, diff, …), and its "
                f"meaning would be lost; {_BY_HAND}"
            )
        module, kind = plain.removesuffix(role), _ROLES[role]
        part = kind if kind in ("weight", "bias", "modulation") else "weight"
        parameter = _parameter(module, part)
        if parameter is None:
            raise ValueError(
                f"{where}: {key} is for {module}, which Wan2.2-TI2V's transformer does not have; "
                "use an adapter that was trained for this model"
            )
        if kind != "alpha":
            _check_values(tensor, f"{where}: {key}")
        entry = (parameter, "difference" if kind == part else kind)
        if entry in parts:
            raise ValueError(
                f"{where}: {parts[entry].key} and {key} mean the same tensor; keep one of them"
            )
        parts[entry] = _Part(key, module.removeprefix("base_model.model."), tensor)
    return parts


def _is_parameter(key: str) -> bool:
    """Whether a key names a parameter of the model itself."""
    module, _, part = key.rpartition(".")
    return _parameter(module, part) is not None


def _check_values(tensor: Tensor, subject: str) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{subject} is {tensor.dtype}, not floating point; {_BY_HAND}")
    if not bool(tensor.float().isfinite().all()):
        raise ValueError(f"{subject} holds NaN or infinity; use an earlier save of it")


def _parameter(module: str, part: str) -> str | None:
    """diffusers' name of a module's parameter; None if there is none of that name."""
    joined = _JOINED.fullmatch(module)
    if joined is not None:
        inner = _UNJOINED.get(joined["module"], "")
        module = inner if joined["block"] is None else f"blocks.{joined['block']}.{inner}"
    module = _PREFIX.sub("", module)
    layouts = (WEIGHT_LAYOUTS["diffusers"], WEIGHT_LAYOUTS["wan"])
    # A scale-shift table is a parameter itself.
    named = (layout.own_name(name) for name in (f"{module}.{part}", module) for layout in layouts)
    return next((name for name in named if name is not None), None)


_UNJOINED = {
    name.replace(".", "_"): name
    for layout in (WEIGHT_LAYOUTS["diffusers"], WEIGHT_LAYOUTS["wan"])
    for name in (key.removeprefix("blocks.#.").rpartition(".")[0] for key in layout.table)
}
"""The path of a module, within its block if it is in one, by the path with underscores for dots."""


@dataclass(frozen=True)
class _Scaling:
    """What a file states for all its pairs.

    Attributes:
        where: what states it.
        alpha: None for a scale of 1.
        rank: None if only the tensors say it.
        alphas, ranks: of single modules, by PEFT's pattern.
        root: whether alpha is divided by the rank's root, and not by the rank.
    """

    where: str = ""
    alpha: float | None = None
    rank: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    root: bool = False

    def of(self, names: tuple[str, ...], rank: int, own: float | None) -> float:
        """The scale of a module's pair.

        Args:
            names: what patterns may call the module.
            rank: of its tensors.
            own: its own alpha, if it has one.

        Raises:
            ValueError: another rank is stated.
        """
        stated = _matching(self.ranks, names, self.rank)
        if stated not in (None, rank):
            raise ValueError(
                f"{self.where}: says rank {stated:g} for {names[1]}, whose tensors have rank "
                f"{rank}; use the configuration that was saved with them"
            )
        alpha = _matching(self.alphas, names, self.alpha) if own is None else own
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.root else rank)


def _matching(
    patterns: Mapping[str, float], names: tuple[str, ...], default: float | None
) -> float | None:
    """The value of the first pattern that one of the names matches, as PEFT matches them."""
    for pattern, value in patterns.items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return default


def _scaling(file: Path, state: Iterable[str]) -> _Scaling:
    """What the configuration beside a file, or its header, states."""
    beside, named = file.with_name(_PEFT), file.stem == "adapter_model"
    if beside.is_file() and (named or any(key.startswith("base_model.") for key in state)):
        return _of_peft(parse_object(beside.read_bytes(), beside), str(beside))
    if named:
        raise ValueError(f"{file}: its scale is in {_PEFT}, which is missing; put it beside it")
    header = read_header(file)
    if _DIFFUSERS in header:
        where = f"{file}: {_DIFFUSERS}"
        stated = parse_object(header[_DIFFUSERS], where)
        return _of_peft({key.removeprefix("transformer."): v for key, v in stated.items()}, where)
    alphas = {
        key: _number(header[key], f"{file}: {key} in its header")
        for key in _HEADER_ALPHAS
        if header.get(key, "None") != "None"
    }
    if len(set(alphas.values())) > 1:
        raise ValueError(
            f"{file}: its header says {' and '.join(f'{k}={v:g}' for k, v in alphas.items())}; "
            "keep the one that it was trained with"
        )
    return _Scaling(str(file), next(iter(alphas.values()), None))


def _of_peft(config: Mapping[str, Any], where: str) -> _Scaling:
    """The scales that a configuration of PEFT means."""
    kind, start = config.get("peft_type") or "LORA", config.get("init_lora_weights")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type is {kind}, and lltk merges LORA; {_BY_HAND}")
    if config.get("use_dora"):
        raise ValueError(f"{where}: use_dora: lltk does not merge DoRA adapters; {_BY_HAND}")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where}: init_lora_weights is {start}, which changes the base weights as well; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    known = _OPTIONS | _IRRELEVANT | {"init_lora_weights"}
    other = [key for key, value in config.items() if value and key not in known]
    if other:
        raise ValueError(f"{where}: lltk does not merge by the options {few(other)}; {_BY_HAND}")

    def numbers(key: str) -> dict[str, float]:
        found = config.get(key) or {}
        try:
            for pattern in found:
                re.compile(pattern)
            return {pattern: _number(v, f"{where}: {key}") for pattern, v in found.items()}
        except (re.error, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: {key} is no object of patterns; repair it") from error

    rank = config.get("r")
    return _Scaling(
        where,
        _number(config.get("lora_alpha", 8), f"{where}: lora_alpha"),  # PEFT's default
        None if rank is None else _number(rank, f"{where}: r"),
        numbers("alpha_pattern"),
        numbers("rank_pattern"),
        bool(config.get("use_rslora")),
    )


def _number(value: Any, where: str) -> float:
    """A finite number, given as one, as a tensor of one or as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        found = repr(value.tolist() if isinstance(value, Tensor) else value)[:40]
        raise ValueError(f"{where} is {found}, not a number; repair it")
    return number


def _file(path: Path) -> Path:
    """The file of an adapter, which may be given as its folder."""
    if not path.is_dir():
        return path
    files = [path / f"{stem}{suffix}" for stem in _STEMS for suffix in (".safetensors", ".bin")]
    there = [file for file in files if file.is_file()] or sorted(path.glob("*.safetensors"))
    if len({file.stem for file in there}) != 1:
        found = few(file.name for file in there) or "no file of an adapter"
        raise ValueError(f"{path}: holds {found}; name one file")
    return there[0]
