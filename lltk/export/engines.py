"""Engines: graphs that TensorRT for RTX has compiled for one kind of GPU.

They are built without a GPU, in a process of their own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lltk.export.facts import ENGINES, KERNELS, EngineFacts, EnginesFacts
from lltk.export.kernels import Sizes, write_kernels
from lltk.export.layers import Layer, lint, meant, read_layers, summary
from lltk.files.tensors import checksum
from lltk.files.writing import NewFolder
from lltk.graph.edit import op_of
from lltk.graph.program import Program
from lltk.ops.implementations import overload
from lltk.stream.runtimes.cubin import FACTS
from lltk.stream.runtimes.tensorrt import GPUS, library_version

if TYPE_CHECKING:
    from onnx import ModelProto

_FP8, _FP4 = 89, 120
"""The least compute capabilities whose tensor cores know these."""
_FORMATS = {
    "nvfp4_matmul": ("FP4 products", _FP4, "nvfp4_infer"),
    "nvfp4_decode_pages": ("FP4 pages", _FP4, "nvfp4_cache"),
    "nvfp4_listed_attention": ("FP4 pages", _FP4, "nvfp4_cache"),
    "nvfp4_quantise_page": ("FP4 pages", _FP4, "nvfp4_cache"),
    "fp8_matmul": ("FP8 products", _FP8, "fp8_infer"),
}
"""What an op's form is, the least compute capability that knows it, and the pass that makes it."""
_MEMORY, _BASE = 5, 1 << 29
"""A builder's memory: so many times the model's weights, and so much beside."""
_SECONDS = 150
"""A builder's time on two cores: so many seconds a GiB of weights, as the 5B's step takes it."""
_LIBRARY = "libtensorrt_rtx.so"


@dataclass(frozen=True)
class EngineOrder:
    """What engines to build.

    Attributes:
        sm: the compute capability that they are for, 120 for 12.0.
        waived: paths of modules whose layers may be slow ones.
        plugin: whether a plugin attends to pages in NVFP4.
    """

    sm: int
    waived: tuple[str, ...] = ()
    plugin: bool = False


@dataclass(frozen=True)
class Built:
    """An engine that was built.

    Attributes:
        layers: of its plan.
        seconds: that it took.
        peak_bytes: the most memory that the building process held.
    """

    layers: list[Layer]
    seconds: float
    peak_bytes: int


def check_gpu(sm: int) -> None:
    """Check that engines are built for a compute capability.

    Args:
        sm: 120 for 12.0.

    Raises:
        ValueError: they are not; says what there is.
    """
    if sm not in GPUS:
        known = ", ".join(f"{each} ({names})" for each, names in GPUS.items())
        raise ValueError(
            f"--sm: TensorRT for RTX builds no engines for {sm}, only for {known}; on other GPUs, "
            "such as H100 (90) and B200 (100), stream the recipe itself, or export it with "
            "--target ort"
        )


def check_formats(programs: Iterable[Program], sm: int) -> None:
    """Check that a GPU's tensor cores know the formats of Programs.

    Raises:
        ValueError: they do not; says what to export instead.
    """
    of_ops = {overload(name): each for name, each in _FORMATS.items()}
    for program in programs:
        for _, graph in program.every_graph():
            for node in graph.nodes:
                if node.op != "call_function":
                    continue
                what, least, made_by = of_ops.get(op_of(node), ("", 0, ""))
                if sm < least:
                    instead = f"without {made_by}, in bfloat16"
                    if made_by == "nvfp4_infer" and sm >= _FP8:
                        instead = f"with fp8_infer in the place of {made_by}, or {instead}"
                    raise ValueError(
                        f"--sm: the recipe has {what}, which need compute capability "
                        f"{least // 10}.{least % 10}, and this is for {sm // 10}.{sm % 10}; export "
                        f"it {instead}; or for --sm {least}"
                    )


def build_memory(weights: int) -> int:
    """About how much memory a build takes, in bytes.

    Args:
        weights: bytes of the parameters that the graph reads.
    """
    return _BASE + _MEMORY * weights


def build_seconds(weights: int) -> float:
    """About how long a build takes on two cores; an engine of convolutions takes less.

    Args:
        weights: bytes of the parameters that the graph reads.
    """
    return _SECONDS * weights / 2**30


def build_costs(weights: int) -> str:
    """What a build takes, in words.

    Args:
        weights: bytes of the parameters that the graph reads.
    """
    minutes = round(build_seconds(weights) / 60)
    time = "a minute or less" if minutes < 2 else f"about {minutes} min"
    return f"{time} on two cores, about {build_memory(weights) / 2**30:.1f} GiB of memory"


def write_engines(
    folder: NewFolder,
    graphs: Sequence[tuple[str, str]],
    order: EngineOrder,
    note: Callable[[str], None],
    sizes: Sizes | None = None,
) -> EnginesFacts:
    """Build the engines of a bundle that is being written, and look at their layers.

    Args:
        folder: the bundle, which has the graphs' models.
        graphs: stage and graph of each.
        order: what to build.
        note: is told what is being done.
        sizes: of the kernels that the plugin runs; None without one.

    Raises:
        ValueError: TensorRT builds none of a graph, a layer is a slow one, or a module that is
            waived has none that could be.
    """
    import onnx

    models = {
        each: onnx.load(folder.path / each[0] / f"{each[1]}.onnx", load_external_data=False)
        for each in graphs
    }
    wanted = {each: meant(model) for each, model in models.items()}
    modules = dict.fromkeys(m.rpartition("/")[0] for each in wanted.values() for m in each)
    if unknown := sorted(set(order.waived) - modules.keys()):
        raise ValueError(
            f"--waive: {unknown[0]} has no product in FP4 or FP8 and no attention; modules that "
            f"have one are {', '.join(modules)}"
        )
    (folder.path / ENGINES).mkdir()
    kernels: tuple[str, ...] = ()
    if sizes:
        note("compiling kernels")
        facts = write_kernels(folder, sizes, order.sm, under=KERNELS)
        names = dict.fromkeys((FACTS, *(launch.file for launch in facts.launches)))
        kernels = tuple(f"{KERNELS}/{name}" for name in names)
    built = []
    for number, (stage, graph) in enumerate(graphs, 1):
        weights = _weights(models[stage, graph])
        note(
            f"building engine {number} of {len(graphs)}, {stage}/{graph}, with weights of "
            f"{weights / 2**30:.2f} GiB: {build_costs(weights)}"
        )
        engine = EngineFacts(stage=stage, graph=graph, seconds=1, peak_bytes=0, layers={})
        made = build_engine(
            folder.path / stage / f"{graph}.onnx",
            folder.path / engine.file,
            order.sm,
            folder.path / KERNELS if sizes else None,
        )
        if slow := list(lint(wanted[stage, graph], made.layers, order.waived)):
            more = f" (and {len(slow) - 1} more)" if len(slow) > 1 else ""
            raise ValueError(
                f"{stage}/{graph}: {slow[0]}{more}; what runs it would be slower than it is meant "
                f"to be: leave the module out of the recipe's pass, or allow it with --waive "
                f"{slow[0].partition(':')[0]}"
            )
        folder.checksums[engine.file] = checksum(folder.path / engine.file)
        table = [each.model_dump() for each in made.layers]
        folder.write_text(engine.table, json.dumps(table, indent=1) + "\n")
        told = {"seconds": made.seconds, "peak_bytes": made.peak_bytes}
        built.append(engine.model_copy(update={**told, "layers": summary(made.layers)}))
    return EnginesFacts(
        version=library_version(),
        sm=order.sm,
        waived=order.waived,
        built=tuple(built),
        kernels=kernels,
    )


def _weights(model: ModelProto) -> int:
    """Bytes of the parameters that a model reads."""
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return sum(int(entry.value) for entry in entries if entry.key == "length")


def build_engine(model: Path, engine: Path, sm: int, kernels: Path | None = None) -> Built:
    """Build an engine in a process of its own.

    Args:
        model: in ONNX, in TensorRT's dialect; its weights beside it.
        engine: the file to write, in a folder that is there.
        sm: compute capability.
        kernels: the folder of those that the model's plugin runs.

    Raises:
        ValueError: TensorRT refuses the model, or its process ended.
    """
    start = time.perf_counter()
    with TemporaryDirectory(prefix="lltk-engine-") as place:
        folder = Path(place)
        log = folder / "plan"
        run = subprocess.run(
            [
                sys.executable, "-P", "-m", "lltk.export.engine_builder",
                str(model), str(engine), str(log), str(sm), *([str(kernels)] if kernels else []),
            ],
            env=_environment(folder), capture_output=True, text=True, check=False,
        )  # fmt: skip
        told: dict[str, Any] = {}
        if run.returncode:
            told["errors"] = [_ended(run)]
        else:
            told = json.loads(run.stdout)
        if errors := told["errors"]:
            raise ValueError(
                f"{model.parent.name}/{model.name}: TensorRT for RTX builds no engine of it: "
                f"{'; '.join(errors)}"
            )
        layers = read_layers(log.read_text(encoding="utf-8").splitlines())
    return Built(layers, time.perf_counter() - start, told["peak_bytes"])


def _environment(folder: Path) -> dict[str, str]:
    """The process's environment.

    The parser opens TensorRT's library by a name without a version where a model has plugins, and
    aborts without it; the wheel has the file under its versioned name alone.
    """
    found = find_spec("tensorrt_rtx_libs")
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    for where in (found.submodule_search_locations or ()) if found else ():
        for library in Path(where).glob(f"{_LIBRARY}.*"):
            (folder / _LIBRARY).symlink_to(library)
        paths.append(where)
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def _ended(run: subprocess.CompletedProcess[str]) -> str:
    """How a process ended, and the last that it said."""
    code = run.returncode
    if code == -signal.SIGKILL:
        return "its process was killed, as one is that takes more memory than there is"
    how = f"ended with {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    last = run.stderr.strip().splitlines()[-1:]
    return f"its process {how}{': ' if last else ''}{''.join(last)}"
