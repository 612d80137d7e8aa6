"""Dividing a module's parameters among ranks, and quantising those that train in NVFP4 there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lltk.graph.edit import op_of
from lltk.graph.module import ProgramModule
from lltk.graph.program import Program
from lltk.graph.verify import WEIGHTS
from lltk.ops.implementations import overload
from lltk.ops.nvfp4_quantise.reference import BLOCK, amax
from lltk.parallel.exchange import all_max, all_parts
from lltk.parallel.groups import SHARDS
from lltk.parallel.mesh import Mesh, local_part

NVFP4_QUANTISE = overload("nvfp4_quantise")


Divided = dict[nn.Parameter, nn.Parameter]
"""By parameters of several modules that are whole, what stands for them where they are divided."""


def divided(
    module: nn.Module, mesh: Mesh, wide: bool, found: Divided | None = None
) -> dict[str, nn.Parameter]:
    """Divide a module's parameters among the shards.

    FSDP2 divides most, and gathers them where they are used. What a module quantises for its graphs
    they read in 4 bits only. Such a weight is divided into rows. Whenever it changes, each rank
    quantises its rows, scaled by the largest magnitude of all, and the 4-bit values are gathered;
    they are those of the whole weight. The module has a stand-in for it, of its shape and without
    memory. A backward pass gives each rank the gradient of its rows: the mean of all ranks', as of
    FSDP2's parameters.

    Args:
        module: a Program's, or any other.
        mesh: with more shards than one.
        wide: whether the rows of weights that train are held in float32, or in the module's dtype.
        found: the parameters of modules that were divided before; gets those of this one. What
            modules share they share afterwards, too.

    Returns:
        Of the weights for which there are stand-ins and that train, the divided ones, by name.

    Raises:
        ValueError: a shard would end within a tile of 16 rows.
    """
    if not isinstance(module, ProgramModule) or WEIGHTS not in module.program.graphs:
        before = dict(module.named_parameters())
        mesh.shard(module)
        if found is not None:
            _hold_once(module, before, found)
        return {}
    return _Quantised(module, mesh, wide).trained


def _hold_once(module: nn.Module, before: Mapping[str, nn.Parameter], found: Divided) -> None:
    """Let a module have the divided parameters of others, where it shared the whole ones.

    FSDP2 takes over what was assigned, as after ``load_state_dict(assign=True)``.
    """
    for name, own in list(module.named_parameters()):
        held = found.setdefault(before[name], own)
        if held is not own:
            _replace(module, name, held)


class _Quantised:
    """Weights that a module has only stand-ins for."""

    def __init__(self, module: ProgramModule, mesh: Mesh, wide: bool) -> None:
        self._program, self._mesh = module.program, mesh
        whole = {name: module.get_parameter(name) for name in _quantised(module.program)}
        for name, weight in whole.items():
            _check_rows(name, weight.shape[0], mesh.shards)
        self._stand_ins = {name: _stand_in(module, name) for name in whole}
        found = mesh.shard(module, apart=frozenset(self._stand_ins.values()))
        self._rows = {
            name: _divide(weight, found, wide and weight.requires_grad)
            for name, weight in whole.items()
        }
        self.trained = {name: rows for name, rows in self._rows.items() if rows.requires_grad}
        for name in self.trained:
            self._stand_ins[name].register_post_accumulate_grad_hook(_Reducing(self._rows[name]))
        module.quantise_by = self._values

    def _values(self) -> dict[str, Tensor]:
        """The 4-bit values of the whole weights, by the names of the graphs' inputs."""
        own = {
            name: local_part(rows.detach()).to(self._stand_ins[name].dtype)
            for name, rows in self._rows.items()
        }
        made: dict[str, Tensor] = _Quantising(self._program, own, self._mesh.shards).run()
        return made


class _Quantising(fx.Interpreter):
    """Runs the graph that quantises weights on rows of them, and gathers what it makes."""

    def __init__(self, program: Program, own: Mapping[str, Tensor], size: int) -> None:
        super().__init__(nn.Module(), graph=program.graphs[WEIGHTS])
        self._program, self._own, self._size = program, own, size

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self._own[target]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        region = self._program.regions[args[0]]
        inside = _Quantising(self._program, self._own, self._size)
        inside.graph = region.graph
        return inside.run(*(self._own[f"{target}.{name}"] for name in region.parameters))

    def run_node(self, n: fx.Node) -> Any:
        if op_of(n) is not NVFP4_QUANTISE:
            return super().run_node(n)
        assert callable(n.target)
        (rows, *rest), _ = self.fetch_args_kwargs_from_env(n)
        largest = all_max(amax(rows), self._size, SHARDS)
        codes, scales, scale = n.target(rows, *rest, None, 0, largest)
        return (*(all_parts(each, 0, self._size, SHARDS) for each in (codes, scales)), scale)


class _Reducing:
    """Adds the mean of all ranks' gradients of a stand-in to the gradient of this rank's rows."""

    def __init__(self, rows: nn.Parameter) -> None:
        self._rows = rows

    def __call__(self, stand_in: Tensor) -> None:
        gradient, stand_in.grad = stand_in.grad, None
        rows: Any = self._rows
        mesh = rows.device_mesh
        assert gradient is not None
        wide = torch.promote_types(gradient.dtype, torch.float32)
        part = DTensor.from_local(gradient.to(wide), mesh, [Partial(), Partial()], run_check=False)
        part = part.redistribute(placements=[Partial(), Shard(0)])
        own = part.redistribute(placements=rows.placements).div(mesh.size()).to(rows.dtype)
        rows.grad = own if rows.grad is None else rows.grad + own


def _quantised(program: Program) -> list[str]:
    """The weights that a graph quantises for the others."""
    names: list[str] = []
    for node in program.graphs[WEIGHTS].nodes:
        if node.op == "get_attr":
            names.append(str(node.target))
        elif node.op == "call_module":
            parameters = program.regions[str(node.args[0])].parameters
            names += [f"{node.target}.{name}" for name in parameters]
    return names


def _check_rows(name: str, rows: int, shards: int) -> None:
    if rows % (BLOCK * shards):
        tiles = rows // BLOCK if rows % BLOCK == 0 else 1
        fit = [str(n) for n in range(1, tiles + 1) if tiles % n == 0]
        layer = name.removesuffix(".weight")
        raise ValueError(
            f"train.shards: {shards} shards of {name} would end within tiles of {BLOCK} of its "
            f"{rows} rows, which have a scale in NVFP4; set train.shards to one of "
            f"{', '.join(fit)}, or exclude it with nvfp4_train.exclude=[{layer!r}]"
        )


def _stand_in(module: nn.Module, name: str) -> nn.Parameter:
    """Put a parameter without memory in the place of another one."""
    weight = module.get_parameter(name)
    zero = weight.new_zeros(())
    made = nn.Parameter(zero.expand(weight.shape), requires_grad=weight.requires_grad)
    _replace(module, name, made)
    return made


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, parameter)


def _divide(weight: nn.Parameter, mesh: DeviceMesh, wide: bool) -> nn.Parameter:
    """Each rank's rows of a weight."""
    value = weight.detach()
    if wide:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
    rows = distribute_tensor(value, mesh, [Replicate(), Shard(0)], src_data_rank=None)
    return nn.Parameter(rows, requires_grad=weight.requires_grad)
