"""The process that builds an engine: it may run out of memory or abort, and its parent goes on.

::

    python -m lltk.export.engine_builder MODEL ENGINE LOG SM [KERNELS]

It writes the engine, and to the log a line for each layer of the builder's plan, and prints what
happened as JSON. The runtime's inspector could tell the layers too, but needs a GPU.
"""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import sys
from pathlib import Path
from typing import IO, Any

import tensorrt_rtx_bindings as trt

from lltk.stream.runtimes.cubin import read_kernels
from lltk.stream.runtimes.tensorrt_plugin import offer

_DIE_WITH_PARENT = 1
"""Linux's number for the signal that a process gets when its parent ends."""


class _Log(trt.ILogger):
    """Keeps errors, and writes the lines of the plan."""

    def __init__(self, plan: IO[str]) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self._plan = plan

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)
        for line in message.splitlines():
            if line.startswith("Name: ") and ", LayerType: " in line:
                self._plan.write(f"{line}\n")


def build(model: Path, engine: Path, plan: IO[str], sm: int) -> dict[str, Any]:
    """Build an engine; the result has ``errors`` if there is none.

    Args:
        model: in ONNX.
        engine: the file to write.
        plan: takes the lines of the plan.
        sm: compute capability, 120 for 12.0.
    """
    log = _Log(plan)
    builder = trt.Builder(log)
    network = builder.create_network(0)  # types are as the model has them
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        found = (parser.get_error(index) for index in range(parser.num_errors))
        return {"errors": [f"{each.node_name()}: {each.desc()}" for each in found]}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    made = builder.build_serialized_network(network, config)
    if made is None:
        return {"errors": log.errors}
    engine.write_bytes(made)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"errors": [], "peak_bytes": peak}


def main() -> None:
    """Build what the command line names, as long as there is a parent to wait for it."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    model, engine, log, sm, *kernels = sys.argv[1:]
    for folder in kernels:
        offer(trt.__name__, read_kernels(Path(folder)))
    with Path(log).open("w", encoding="utf-8", buffering=1) as plan:
        sys.stdout.write(json.dumps(build(Path(model), Path(engine), plan, int(sm))))


if __name__ == "__main__":
    main()
