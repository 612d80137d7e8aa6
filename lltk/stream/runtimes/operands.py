"""What a call of an exported graph reads and writes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lltk.graph.contract import Contract, TensorSpec


def operands(
    contract: Contract,
    given: Mapping[str, Tensor],
    into: Mapping[str, Tensor] | None,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A call's inputs and outputs by name, contiguous and as the contract says.

    Args:
        contract: of the graph.
        given: every input; more may be there.
        into: where outputs are put; None, or an output left out, for new tensors.
        device: of the graph.
    """
    put = dict(into or {})
    for name, spec in contract.outputs.items():
        if name not in put:
            put[name] = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    inputs = {name: given[name].contiguous() for name in contract.inputs}
    for tensors, specs in (inputs, contract.inputs), (put, contract.outputs):
        for name, tensor in tensors.items():
            assert TensorSpec.of(tensor) == specs[name], f"{name} is {TensorSpec.of(tensor)}"
            assert tensor.is_contiguous() and tensor.device.type == device.type, name
    return inputs, put
