"""oneDNN for a decoder's convolutions on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lltk.graph.edit import calls
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage

OP = torch.ops.aten.conv3d.default


class Config(PassConfig):
    """Nothing to configure."""


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """``aten.conv3d`` by oneDNN, for float32 on a CPU.

    The weight is given with channels last, for which oneDNN is faster.
    """
    last = weight.contiguous(memory_format=torch.channels_last_3d)
    result: Tensor = torch.ops.aten.mkldnn_convolution.default(
        input, last, bias, padding, stride, dilation, groups
    )
    return result


class OnednnConv3d(Pass[Config]):
    """Let oneDNN compute every 3-d convolution.

    ::

        aten.conv3d(…)  →  lltk.passes.onednn_conv3d.conv3d(…)

    For one clip, torch itself uses a loop that is several times slower where channels × frames ×
    height are at most 20480. In a small decoder these are most convolutions.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    kinds = ("decode", "encode")
    numerics = Numerics.ROUNDING

    def requires(self, program: Program) -> None:
        if program.dtype != torch.float32:
            raise ValueError(f"is for float32, the program computes in {program.dtype}; remove it")

    def apply(self, program: Program, report: Report) -> None:
        for _, graph in program.every_graph():
            for node in calls(graph, OP):
                node.target, node.meta["op"] = conv3d, OP
                report.match("conv3d")
