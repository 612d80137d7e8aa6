"""Time whole training steps of the 5B: reading, encoding, forward, backward, exchange, update.

    python benchmarks/training_iteration.py
    torchrun --nproc-per-node 2 benchmarks/training_iteration.py --rows '16 s, all recomputed'
    python benchmarks/training_iteration.py --pipeline tiny --recipe tiny_train --frames 12

A pipeline of the true sizes with random weights, and clips, are made first, unless --pipeline names
a pipeline. With --folder they stay there, and the next command finds them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from lltk.bench.layouts import with_layout
from lltk.bench.random_pipeline import make_clips, wan22_5b_pipeline
from lltk.bench.record import Record, markdown, percentile, write_record
from lltk.bench.script import column, script_options, script_parser, script_record
from lltk.graph.memory import readable, total
from lltk.graph.recipe import read_recipe
from lltk.graph.recipe_files import find_recipe
from lltk.models.vae_frames import Way, encoded_frames
from lltk.models.wan_vae import CONFIGS, validate_config
from lltk.parallel.groups import SEQUENCE, regrouped
from lltk.parallel.ranks import Ranks, joined
from lltk.streaming.traffic import sent_bytes
from lltk.tasks.transformer import plan_transformer
from lltk.training import open_training

_METHOD = """\
Whole steps of {recipe}, one clip for all ranks, through `open_training`: clips are read from
H.264 files and encoded, and nothing is kept between steps but the embeddings of captions. Changed
keys: {changes}. Seconds are medians of {runs} steps after one that warms up, of the slowest rank;
parts are those of each rank, in order. Expected is a model: the one rank's forward and backward
pass divided by the ranks, its data by the share of the frames that the busiest rank encodes, its
update as it is, and the sent bytes twice (a backward pass sends as many) over {link:.0f} GB/s each
way; nothing hides anything, and what fewer recomputed blocks save is not counted. Sent is counted
from the graph, for a forward pass. Peak memory is torch's, of the rank that needs most, beside the
estimate of `lltk train --dry-run`. Losses and gradient norms are those of all steps; rows with
equal clips have equal ones up to rounding. Weights and clips are random; sizes are the true
ones."""


@dataclass(frozen=True)
class Row:
    """One way to share a step's work.

    Attributes:
        frames: latent frames of a clip.
        layout: the pass that divides a clip among ranks; None for one rank a clip.
        kept: how many blocks keep what attention gives.
        encoding: how ranks encode a clip.
    """

    frames: int
    layout: str | None = None
    kept: int = 0
    encoding: Way = "shared"


ROWS = {
    "16 s": Row(96, kept=20),
    "16 s, all recomputed": Row(96),
    "27 s, all recomputed": Row(160),
    "16 s, balanced, encoder handed on": Row(96, "balanced_sp", 30),
    "16 s, balanced, encoder looks back": Row(96, "balanced_sp", 30, "lookback"),
    "16 s, naive, whole encoder": Row(96, "naive_sp", 30, "whole"),
    "27 s, balanced, encoder handed on": Row(160, "balanced_sp", 30),
    "27 s, balanced, encoder looks back": Row(160, "balanced_sp", 30, "lookback"),
    "27 s, naive, whole encoder": Row(160, "naive_sp", 30, "whole"),
    "51 s, balanced, encoder handed on": Row(304, "balanced_sp"),
    "4 s": Row(24, kept=30),
    "4 s, balanced, encoder handed on": Row(24, "balanced_sp", 30),
    "4 s, balanced, encoder looks back": Row(24, "balanced_sp", 30, "lookback"),
    "4 s, naive, whole encoder": Row(24, "naive_sp", 30, "whole"),
}
_ALWAYS = (
    "train.steps=1000000",
    "train.checkpoint_every=1000000",
    "geometry.batch=1",
    "train.batch=1",
    "train.validate_every=null",
    "train.sample_every=null",
    "train.data.shots=1",
    "train.data.clips=null",
    "train.data.frames=null",
)
NVLINK = 450e9
"""Bytes a second each way between two Hopper GPUs of a host, by their data sheet."""
_PATIENCE = timedelta(minutes=20)
"""How long ranks wait for one that measures alone."""
_LARGE = ("train.optimiser=adamw_8bit", "train.weights=compute", "train.ema_decay=null")
"""How the 5B and a clip of 16 s fit on one GPU of 141 GB."""


def parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = script_parser(__file__, __doc__, runs=3)
    made.add_argument("--recipe", default="wan22_5b_train_16s", help="(default: %(default)s)")
    made.add_argument("--pipeline", help="a pipeline to use instead of random weights")
    made.add_argument("--folder", type=Path, help="where to make weights and clips, and find them")
    made.add_argument("--alone", type=Path, help="a record with a row of one rank")
    made.add_argument("--frames", type=int, help="latent frames of all rows, to try the script")
    made.add_argument("--rows", nargs="+", default=["16 s"], choices=list(ROWS), metavar="ROW")
    made.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    return made


def rows(options: argparse.Namespace) -> list[str]:
    """The names of the rows that a command makes."""
    return list(options.rows)


def main() -> None:
    """Measure, and write the record again after each row."""
    options = script_options(parser())
    results: list[dict[str, Any]] = []
    alone = Record.model_validate_json(options.alone.read_text()).results if options.alone else []
    where = nullcontext(options.folder) if options.folder else TemporaryDirectory()
    with joined(options.device, _PATIENCE) as ranks, where as made:
        folder = _shared(Path(made), ranks)
        if ranks.rank == 0 and not (folder / "clips").exists():
            _make(options, folder, ranks.device)
        ranks.any(False)  # the first has made it
        for name in options.rows:
            with _sharing(ROWS[name], ranks) as own:
                if own is not None:
                    row = {"name": name} | measure(ROWS[name], options, folder, own)
                    results.append(row | expected(row, [*results, *alone]))
            if ranks.rank == 0:
                _write(options, results, ranks)
        ranks.any(False)  # the first removes the folder last


@contextmanager
def _sharing(row: Row, ranks: Ranks) -> Iterator[Ranks | None]:
    """The ranks that make a row, for those that do; all wait for its end."""
    if row.layout is not None or ranks.size == 1:
        yield ranks
        return
    with regrouped(SEQUENCE, 1):
        yield Ranks(0, 1, ranks.device) if ranks.rank == 0 else None
        ranks.any(False)


def _write(options: argparse.Namespace, results: list[dict[str, Any]], ranks: Ranks) -> None:
    changes = ", ".join(_changes(options)) or "none"
    method = _METHOD.format(
        recipe=options.recipe, changes=changes, runs=options.runs, link=NVLINK / 1e9
    )
    record = script_record("training_iteration", method, results, ranks.size)
    write_record(options.output, record, text(record))
    print({k: v for k, v in results[-1].items() if k != "every"}, flush=True)


def _shared(folder: Path, ranks: Ranks) -> Path:
    """The first rank's folder, on every rank."""
    if ranks.size == 1:
        return folder
    found: list[Any] = [str(folder)]
    dist.broadcast_object_list(found, src=0)
    return Path(found[0])


def _changes(options: argparse.Namespace) -> list[str]:
    large = () if options.pipeline else _LARGE
    return [*large, *options.changes]


def _frames(row: Row, options: argparse.Namespace) -> int:
    return row.frames if options.frames is None else options.frames


def _make(options: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Write what every row reads."""
    recipe = read_recipe(find_recipe(options.recipe))
    geometry = recipe["geometry"]
    size = (int(geometry.get("height", 704)), int(geometry.get("width", 1280)))
    frames = 4 * max(_frames(ROWS[name], options) for name in options.rows) + 40
    with ThreadPoolExecutor(1) as thread:
        clips = thread.submit(make_clips, folder / "clips", 1, frames, size, 24.0)
        if options.pipeline is None:
            wan22_5b_pipeline(folder, device)
        clips.result()


def measure(row: Row, options: argparse.Namespace, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A row's seconds, memory and losses."""
    pipeline = options.pipeline or str(folder / "pipeline")
    own = [f"geometry.frames={_frames(row, options)}", f"train.data.folder={folder / 'clips'}"]
    own += [f"train.data.pipeline={pipeline}", "train.data.fps=24"]
    if options.pipeline is None:
        own.append(f"model.checkpoint={folder / 'pipeline' / 'transformer'}")
    kept = [f"train.keep_attention={row.kept}", f"train.data.encoding={row.encoding}"]
    changes = [*_ALWAYS, *own, *_changes(options), *kept]
    data = dict(read_recipe(find_recipe(options.recipe), changes))
    data["passes"] = with_layout(data["passes"], row.layout, ranks.size)
    torch._dynamo.reset()
    gc.collect()  # the row before
    plan = plan_transformer(data, ranks.device, options.recipe)
    cuda = ranks.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ranks.device)
    with (
        TemporaryDirectory() as made,
        open_training(plan, _shared(Path(made), ranks) / "run", ranks=ranks) as run,
    ):
        every = [next(iter(run)) for _ in range(options.runs + 1)]
        peak = torch.cuda.max_memory_allocated(ranks.device) if cuda else 0
    steps = every[1:]
    mine = {
        "seconds": [step.seconds for step in steps],
        "peak": peak,
        "memory": dict(every[0].memory),
        "parts": {p: statistics.median(s.parts[p] for s in steps) for p in steps[0].parts},
    }
    gathered: list[Any] = [mine]
    if ranks.size > 1:
        gathered = [None] * ranks.size
        dist.all_gather_object(gathered, mine)
    slowest = [max(each) for each in zip(*(one["seconds"] for one in gathered), strict=True)]
    encoder = validate_config(CONFIGS["wan22_vae" if options.pipeline is None else "tiny_vae"])
    encoded = encoded_frames(encoder, _frames(row, options), ranks.size, row.encoding)
    return {
        "sent": sent_bytes(plan.program, "train"),
        "encoded": list(encoded),
        "seconds": statistics.median(slowest),
        "p90": percentile(slowest, 0.9),
        "ranks": ranks.size,
        "frames": _frames(row, options),
        "kept": row.kept,
        "mfu": steps[-1].mfu,
        "tokens_per_second": steps[-1].tokens_per_second,
        "peak": max(one["peak"] for one in gathered),
        "memory": gathered[0]["memory"],
        "estimate": dict(plan.memory),
        "losses": [step.loss for step in every],
        "norms": [step.grad_norm for step in every],
        "every": gathered,
    }


def expected(row: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The model's seconds of a row, if one rank's are among the others."""
    sizes = (row["frames"], 1)
    alone = [one for one in others if (one["frames"], one["ranks"]) == sizes]
    if row["ranks"] == 1 or not alone:
        return {}
    parts: Mapping[str, float] = alone[0]["every"][0]["parts"]
    share = max(row["encoded"]) / sum(alone[0]["encoded"])
    passes = (parts["forward"] + parts["backward"]) / row["ranks"]
    sent = 2 * row["sent"] / NVLINK
    return {"expected": share * parts["data"] + passes + parts["optimiser"] + sent}


def text(record: Record) -> str:
    """The record as Markdown."""

    def parts(row: Mapping[str, Any]) -> str:
        return "; ".join(
            ", ".join(f"{part} {seconds:.2f}" for part, seconds in rank["parts"].items())
            for rank in row["every"]
        )

    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "row": lambda row: row["name"],
        "latent frames": column("frames", "d"),
        "ranks": column("ranks", "d"),
        "attention kept": lambda row: f"{row['kept']} blocks",
        "seconds (p90)": lambda row: f"{row['seconds']:.2f} ({row['p90']:.2f})",
        "expected": lambda row: f"{row['expected']:.2f}" if "expected" in row else "–",
        "seconds by part": parts,
        "frames encoded": lambda row: ", ".join(map(str, row["encoded"])),
        "sent": lambda row: readable(row["sent"]),
        "MFU": lambda row: "–" if row["mfu"] is None else f"{100 * row['mfu']:.0f} %",
        "tokens a second": lambda row: f"{row['tokens_per_second']:.0f}",
        "peak memory": lambda row: readable(row["peak"]) if row["peak"] else "–",
        "estimate": lambda row: readable(total(row["estimate"])),
        "losses": lambda row: ", ".join(f"{loss:.4f}" for loss in row["losses"]),
        "gradient norms": lambda row: ", ".join(f"{norm:.4f}" for norm in row["norms"]),
    }
    return markdown(record, "Training steps of the 5B", columns)


if __name__ == "__main__":
    main()
