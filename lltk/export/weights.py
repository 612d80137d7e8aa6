"""The parameters of a Program's graphs, in one file that all of them read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from onnx import ModelProto, StringStringEntryProto, TensorProto
from torch import Tensor

from lltk.export.facts import WEIGHTS
from lltk.files.tensors import tensor_places, write_tensors
from lltk.files.writing import NewFolder


class WeightPool(Mapping[str, Tensor]):
    """Parameters by name, each as the graphs read it; a tensor is made when it is asked for.

    The file is safetensors: ONNX reads the tensors in it by offset and length.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Tensor, torch.dtype]] = {}

    def add(
        self, name: str, tensor: Tensor, dtype: torch.dtype, transposed: bool = False
    ) -> tuple[str, Tensor]:
        """Note a parameter, cast to a dtype when it is written.

        Returns:
            Its name in the file, and its shape as a tensor.
        """
        known, value = (f"{name}.transposed", tensor.t()) if transposed else (name, tensor)
        self._known.setdefault(known, (value, dtype))
        return known, value

    def __getitem__(self, name: str) -> Tensor:
        tensor, dtype = self._known[name]
        return tensor.detach().to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def write(self, folder: NewFolder, where: str, models: Mapping[str, ModelProto]) -> None:
        """Write models, and the file that all of them read, to a folder in a bundle.

        Args:
            folder: the bundle.
            where: name of the folder in it.
            models: by name; their parameters get their places in the file.
        """
        with folder.file(f"{where}/{WEIGHTS}") as file:
            write_tensors(file, self, {})
        places = tensor_places(folder.path / where / WEIGHTS)
        for name, model in models.items():
            for tensor in model.graph.initializer:
                if tensor.name in self._known:
                    place = places[tensor.name]
                    length = place.end - place.start
                    _point(tensor, {"location": WEIGHTS, "offset": place.start, "length": length})
            with folder.file(f"{where}/{name}.onnx") as file:
                file.write(model.SerializeToString())


def _point(tensor: TensorProto, place: Mapping[str, object]) -> None:
    """Say where the data of a tensor is."""
    tensor.data_location = TensorProto.EXTERNAL
    entries: Iterable[StringStringEntryProto] = (
        StringStringEntryProto(key=key, value=str(value)) for key, value in place.items()
    )
    tensor.external_data.extend(entries)
