"""The process of `benchmarks/row_kernels.py` that times the kernels of one checkout.

It answers a label by what it measured, and ``labels`` by what there is. It imports only what both
checkouts have, and takes one argument: its options as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lltk.bench.clock import Clock
from lltk.ops.implementations import find_implementation

EPS = 1e-6
Calls = dict[str, Callable[[], Any]]
"""What is timed, by label."""


def operands(options: Mapping[str, Any], tokens: int) -> dict[str, Tensor]:
    """The same values in every process."""
    generator = torch.Generator().manual_seed(0)
    width = 128 * options["heads"]

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator).to(options["device"], dtype)

    table = normal(1, options["frames"], 3, width, dtype=torch.float32)
    scale, shift, gate = (part.squeeze(2).unsqueeze(2) for part in table.chunk(3, 2))
    return {
        "x": normal(1, tokens, width),
        "y": normal(1, tokens, width),
        "wide": normal(1, tokens, options["ffn"]),
        "heads": normal(1, tokens, options["heads"], 128),
        "scale": scale,
        "shift": shift,
        "gate": gate,
    }


def new_calls(given: Mapping[str, Tensor], name: str) -> Calls:
    """One op, whose arguments say what it does."""
    run = find_implementation("row_pipeline", name).load()
    x, scale, shift = (given[key] for key in ("x", "scale", "shift"))
    total = {"x": x, "y": given["y"], "keep_sum": True}
    modulated = {"scale": scale, "shift": shift, "eps": EPS}
    affine = {"scale": scale[0, 0, 0], "shift": shift[0, 0, 0], "eps": EPS}
    arguments: dict[str, dict[str, Any]] = {
        "quantise": {"x": x},
        "quantise heads": {"x": given["heads"]},
        "modulated norm, quantise": {"x": x, **modulated},
        "norm, quantise": {"x": x, **affine},
        "gated sum, norm, quantise": {**total, "gate": given["gate"], **affine},
        "sum, modulated norm, quantise": {**total, **modulated},
        "GELU, quantise": {"x": given["wide"], "activation": "gelu"},
        "modulated norm, NVFP4": {"x": x, **modulated, "to": "nvfp4"},
        "gated sum": {"x": x, "y": given["y"], "gate": given["gate"], "to": "plain"},
    }
    return {label: partial(run, **{"to": "fp8", **each}) for label, each in arguments.items()}


def old_calls(given: Mapping[str, Tensor], name: str) -> Calls:
    """An op for each combination."""
    from lltk.ops.nvfp4_backends import implementation

    def op(called: str) -> Callable[..., Any]:
        return find_implementation(called, name).load()

    in_nvfp4 = implementation("nvfp4_quantise_norm", "triton" if name == "triton" else "reference")
    x, y, gate = (given[key] for key in ("x", "y", "gate"))
    modulated = (given["scale"], given["shift"], EPS)
    affine = (given["scale"][0, 0, 0], given["shift"][0, 0, 0], EPS)
    return {
        "quantise": partial(op("fp8_quantise"), x),
        "quantise heads": partial(op("fp8_quantise"), given["heads"]),
        "modulated norm, quantise": partial(op("fp8_quantise_norm"), x, *modulated),
        "norm, quantise": partial(op("fp8_quantise_norm"), x, *affine),
        "gated sum, norm, quantise": partial(op("fp8_quantise_add_norm"), x, y, gate, *affine),
        "sum, modulated norm, quantise": partial(
            op("fp8_quantise_add_norm"), x, y, None, *modulated
        ),
        "GELU, quantise": partial(op("fp8_quantise_gelu"), given["wide"]),
        "modulated norm, NVFP4": partial(in_nvfp4, x, *modulated),
        "gated sum": partial(op("gated_add"), x, y, gate),
    }


def host_us(call: Callable[[], Any], calls: int) -> float:
    """Microseconds that Python and the driver take to launch a call."""
    call()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def digests(result: Any) -> list[str]:
    """A short hash of each result's bytes; sorted, because the ops return them in other orders."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    parts = (t.contiguous().flatten().view(torch.uint8).cpu().numpy() for t in tensors)
    return sorted(hashlib.sha256(part).hexdigest()[:12] for part in parts)


@torch.no_grad()
def main() -> None:
    """Answer until there are no more questions."""
    options = json.loads(sys.argv[1])
    make = old_calls if options["old"] else new_calls
    clock = Clock(torch.device(options["device"]), options["runs"])
    calls = make(operands(options, options["tokens"]), options["implementation"])
    small = make(operands(options, options["frames"]), options["implementation"])
    for line in sys.stdin:
        label = line.strip()
        if label == "labels":
            print(json.dumps(list(calls)), flush=True)
            continue
        found = {"digests": digests(calls[label]()), **clock(calls[label])}
        found["host_us"] = host_us(small[label], options["calls"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
