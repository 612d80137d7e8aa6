"""The names of a Wan transformer's weights in each checkpoint layout.

lltk's own names are diffusers', such as ``blocks.0.attn1.to_q.weight``. For LoRA they are the
module's path and ``.lora_A.weight`` or ``.lora_B.weight``. A `Layout` maps a file's names to lltk's
and back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lltk.graph.weights import few

_WRAPPERS = re.compile(
    r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|_forward_module|module)\."
)
_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]*)\.")


def _lookup(table: Mapping[str, str], key: str) -> str | None:
    block = _BLOCK.match(key)
    if block is None:
        return None if key.startswith("blocks.") else table.get(key)
    name = table.get("blocks.#." + key[block.end() :])
    return name and name.replace("#", block[1])


def _strict(names: Mapping[str, str | None], where: str, required: str) -> dict[str, str]:
    unmapped = [key for key, name in names.items() if name is None]
    if unmapped:
        raise ValueError(
            f"{where}: {len(unmapped)} of {len(names)} keys are not {required}: {few(unmapped)}; "
            "use the file of one Wan transformer, without image or control branches"
        )
    count = Counter(names.values())
    twice = [key for key, name in names.items() if count[name] > 1]
    if twice:
        raise ValueError(
            f"{where}: {len(twice)} keys share a name once their wrapper prefixes are stripped: "
            f"{few(twice)}; keep one of each"
        )
    return {key: name for key, name in names.items() if name is not None}


@dataclass(frozen=True)
class Layout:
    """A way of naming weights.

    Parts of a name that come from a wrapper, such as ``_orig_mod.``, are left out when a name is
    read, and never written.

    Attributes:
        name: of the layout.
        prefix: what every name of a file begins with.
        table: lltk's name for what follows the prefix. ``blocks.#.`` stands for every block.
    """

    name: str
    prefix: str
    table: Mapping[str, str]

    def own_name(self, key: str) -> str | None:
        """lltk's name for one of a file; None if this layout has no such name."""
        key = _WRAPPERS.sub("", key)
        return _lookup(self.table, key[len(self.prefix) :]) if key.startswith(self.prefix) else None

    def read(self, keys: Iterable[str], where: str) -> dict[str, str]:
        """lltk's name for each name of a file; raises ValueError if one has none."""
        names = {key: self.own_name(key) for key in keys}
        return _strict(names, where, f"of the layout {self.name!r}")

    def write(self, keys: Iterable[str], where: str) -> dict[str, str]:
        """A file's name for each of lltk's names; raises ValueError if one has none."""
        inverse = {own: key for key, own in self.table.items()}
        names = {own: _lookup(inverse, own) for own in keys}
        return {
            own: self.prefix + key for own, key in _strict(names, where, "lltk's names").items()
        }


def weight_layout(keys: Iterable[str], where: str) -> Layout:
    """The layout of a transformer's file, with the prefix that the file's names have.

    The prefix may be any, such as ``model.diffusion_model.``. It is the one of most names.

    Raises:
        ValueError: no name is a Wan transformer's.
    """
    listed = list(keys)
    found: Counter[tuple[str, str]] = Counter()
    for key in listed:
        parts = _WRAPPERS.sub("", key).split(".")
        for name in ("diffusers", "wan"):
            table = WEIGHT_LAYOUTS[name].table
            starts = (i for i in range(len(parts)) if _lookup(table, ".".join(parts[i:])))
            if (start := next(starts, None)) is not None:
                found[name, "".join(f"{part}." for part in parts[:start])] += 1
    if not found:
        raise ValueError(
            f"{where}: none of its {len(listed)} keys ({few(listed)}) is of a known layout "
            f"({', '.join(WEIGHT_LAYOUTS)}); use the file of a Wan transformer"
        )
    [((name, prefix), _)] = found.most_common(1)
    longlive = WEIGHT_LAYOUTS["longlive"]
    if (name, prefix) == ("wan", longlive.prefix):
        return longlive
    return replace(WEIGHT_LAYOUTS[name], prefix=prefix)


_ATTENTION = {"self_attn": "attn1", "cross_attn": "attn2"}
_LINEAR = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
} | {
    f"blocks.#.{wan}.{short}": f"blocks.#.{own}.{long}"
    for wan, own in _ATTENTION.items()
    for short, long in {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}.items()
}
_AFFINE = _LINEAR | {"patch_embedding": "patch_embedding", "blocks.#.norm3": "blocks.#.norm2"}
_WAN = (
    {
        f"{wan}.{part}": f"{own}.{part}"
        for wan, own in _AFFINE.items()
        for part in ("weight", "bias")
    }
    | {
        f"blocks.#.{wan}.{norm}.weight": f"blocks.#.{own}.{norm}.weight"
        for wan, own in _ATTENTION.items()
        for norm in ("norm_q", "norm_k")
    }
    | {
        "head.modulation": "scale_shift_table",
        "blocks.#.modulation": "blocks.#.scale_shift_table",
    }
)
_LORA = {
    f"{wan}.lora_{x}.weight": f"{own}.lora_{x}.weight" for wan, own in _LINEAR.items() for x in "AB"
}
_OWN = {own: own for own in _WAN.values()}
_OWN_LORA = {own: own for own in _LORA.values()}

WEIGHT_LAYOUTS: Mapping[str, Layout] = {
    "diffusers": Layout("diffusers", "", _OWN),
    "wan": Layout("wan", "", _WAN),
    "longlive": Layout("longlive", "model.", _WAN),
}
LORA_LAYOUTS: Mapping[str, Layout] = {
    "diffusers": Layout("diffusers", "transformer.", _OWN_LORA),
    "peft": Layout("peft", "base_model.model.", _OWN_LORA),
    "longlive": Layout("longlive", "base_model.model.", _LORA),
}
