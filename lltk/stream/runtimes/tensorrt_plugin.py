"""Attention over listed pages in NVFP4 as a plugin of TensorRT's, by kernels compiled beforehand.

An engine has only the plugin's name. Whoever builds or loads one offers the kernels first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from lltk.stream.runtimes.cubin import KernelFacts, Kernels
from lltk.stream.runtimes.tensorrt_types import DTYPES, tensor_shape

NAME, NAMESPACE, VERSION = "LltkListedAttention", "lltk", "1"
"""What TensorRT knows the plugin by."""
_ALIGNMENT = 256
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Offer:
    """Kernels that the plugin may run.

    Attributes:
        facts: of the kernels.
        kernels: the same, loaded; None where engines are built.
    """

    facts: KernelFacts
    kernels: Kernels | None = None

    @property
    def places(self) -> dict[str, int]:
        """Where each workspace begins in the memory that TensorRT gives for all of them."""
        places, end = {}, 0
        for name, size in self.facts.workspaces.items():
            places[name] = end
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return places

    @property
    def memory(self) -> int:
        """Bytes of all workspaces."""
        sizes = self.facts.workspaces.values()
        return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def offer(bindings: str, facts: KernelFacts, kernels: Kernels | None = None) -> None:
    """Let engines of this process run kernels, for the shapes that they are for.

    Args:
        bindings: the Python module of TensorRT.
        facts: of the kernels.
        kernels: the same, loaded; None where engines are built.
    """
    shapes = tuple(map(tensor_shape, facts.tensors.contract.inputs.values()))
    _registered(bindings)[shapes] = Offer(facts, kernels)


@cache
def _registered(bindings: str) -> dict[Shapes, Offer]:
    """Register the plugin; gives what is offered to it."""
    trt: Any = import_module(bindings)
    offers: dict[Shapes, Offer] = {}
    plugin = _plugin(trt, offers)

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return plugin()

    creator = Creator()
    assert trt.get_plugin_registry().register_creator(creator, NAMESPACE), f"{NAME} is taken"
    _CREATORS[bindings] = creator
    return offers


_CREATORS: dict[str, Any] = {}
"""Registered creators, by module; TensorRT does not keep them alive."""


def _plugin(trt: Any, offers: Mapping[Shapes, Offer]) -> Any:
    """The plugin's class."""

    class ListedAttention(
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        """Its inputs and its output are those of the kernels that are offered for their shapes."""

        def __init__(self) -> None:
            for base in ListedAttention.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
            self.num_outputs = 1

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            return [types[0]]

        def get_output_shapes(self, inputs: Sequence[Any], shapes: Any, build: Any) -> list[Any]:
            return [trt.DimsExprs(inputs[0])]

        def supports_format_combination(self, place: int, tensors: Any, inputs: int) -> bool:
            found = _offered(offers, [each.desc for each in tensors[:inputs]])
            contract = found.facts.tensors.contract
            spec = [*contract.inputs.values(), *contract.outputs.values()][place]
            own, wanted = tensors[place].desc, getattr(trt.DataType, DTYPES[spec.dtype])
            return bool(own.format == trt.TensorFormat.LINEAR and own.type == wanted)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return _offered(offers, [each.desc for each in inputs]).memory

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([])

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def clone(self) -> Any:
            return ListedAttention()

        def enqueue(
            self,
            described: Any,
            _: Any,
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            found = _offered(offers, described)
            assert found.kernels is not None, "the kernels were not loaded"
            contract = found.facts.tensors.contract
            names = [*contract.inputs, *contract.outputs]
            addresses = dict(zip(names, [*inputs, *outputs], strict=True))
            addresses |= {name: workspace + place for name, place in found.places.items()}
            found.kernels.launch(addresses, stream)

    return ListedAttention


def _offered(offers: Mapping[Shapes, Offer], described: Sequence[Any]) -> Offer:
    """What is offered for inputs."""
    shapes = tuple(tuple(each.dims) for each in described)
    assert shapes in offers, f"no kernels for {shapes}"
    return offers[shapes]
