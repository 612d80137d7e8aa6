"""Benchmark records: what they hold, what their numbers mean, how they read."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PASSES, Run, after, make_recipe, reached, refused, tiny_config
from streams import SIZES, save_pipeline
from torch import fx

from lltk.bench import record as records
from lltk.bench.ceiling import Product, ceiling, products
from lltk.bench.profiling import launched
from lltk.bench.random_weights import with_random_weights
from lltk.bench.record import (
    Record,
    digest,
    make_record,
    markdown,
    markdown_table,
    percentile,
    write_record,
)
from lltk.bench.stream import METHOD, Timings, summary, text
from lltk.compiler import transform
from lltk.graph.program import Program
from lltk.ops.fp8_rows import fp8_quantise
from lltk.ops.implementations import find_implementation
from lltk.stream.chunks import Chunk
from lltk.stream.report import ChunkReport

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 5), (0.9, 9), (0.91, 10), (1.0, 10), (0.01, 1)]
)
def test_percentiles_are_values_that_occurred(share: float, expected: float) -> None:
    assert percentile([10, 1, 9, 2, 8, 3, 7, 4, 6, 5], share) == expected
    assert percentile([3], share) == 3


def test_a_record_says_what_it_depends_on(tmp_path: Path) -> None:
    record = make_record("trial", "lltk trial", "A trial.", [{"name": "one", "fps": 16.04}])
    assert record.hardware.cores >= 1 and record.hardware.memory > 2**28
    assert {"python", "lltk", "torch", "diffusers"} <= record.versions.keys()
    assert record.commit
    table = markdown(record, "Trial", {"name": lambda r: r["name"], "FPS": lambda r: f"{r['fps']}"})
    write_record(tmp_path / "new" / "a.trial", record, table)
    stored = (tmp_path / "new" / "a.trial.json").read_text()
    assert Record.model_validate_json(stored) == record
    read = (tmp_path / "new" / "a.trial.md").read_text()
    assert read == table and "| name | FPS |\n| --- | --- |\n| one | 16.04 |\n" in read
    for said in (record.commit, str(record.hardware), record.versions["torch"], "`lltk trial`"):
        assert said in read


def test_a_commit_is_dirty_where_a_source_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are no sources: the second record of a session is as clean as the first."""
    here, notes = tmp_path / "lltk" / "record.py", tmp_path / "notes.md"
    script, made = (tmp_path / "benchmarks" / name for name in ("a.py", "records/a.json"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for path in (here, script, made):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.setattr(records, "__file__", str(here))
    assert records.commit() == "unknown"
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "All"]):
        subprocess.run([*git, *words], check=True)
    clean = records.commit()
    for path in (made, notes):
        path.write_text("changed")
    assert records.commit() == clean
    for path in (here, script):
        path.write_text("changed")
        assert records.commit() == f"{clean}-dirty"
        path.write_text("")
    assert records.commit() == clean and len(clean) >= 7


def test_tables_and_digests() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_a_kernel_has_one_owner() -> None:
    from lltk.bench.profiling import owner_of, profiled, timed

    owners = {"compiled": ("triton_poi_",), "GEMM": ("gemm", "nvjet"), "other": ()}
    assert owner_of("triton_poi_fused_gemm_0", owners) == "compiled"
    assert owner_of("nvJet_hsh_128", owners) == "GEMM"
    assert owner_of("vectorized_copy", owners) == "other"
    calls: list[int] = []
    found = timed(lambda: calls.append(1), torch.device("cpu"), runs=4, warm_up=2)
    assert len(calls) == 6 and 0 <= found["median_ms"] <= found["p90_ms"]
    assert profiled(lambda: None, torch.device("cpu"), owners) == ({}, None)


def report(chunk: int, seconds: float = 2.0) -> ChunkReport:
    """The report of a chunk of 8 frames that spent 1 s in the graphs that DiT FPS counts."""
    graphs = {"prologue": 0.25, "step": 0.75, "commit": 0.25}
    return ChunkReport(
        chunk=Chunk(chunk, 0, 0, "a shot", False, range(8 * chunk, 8 * chunk + 8)),
        latents=torch.zeros(()),
        pages=3,
        seconds=seconds,
        text=0.1,
        graphs=graphs,
        waited=0.5,
        decoding={"decode": 0.4, "deliver": 0.1},
    )


def timings(**changes: Any) -> Timings:
    values: dict[str, Any] = {
        "loading": 3.0,
        "begun": 100.0,
        "first": 101.5,
        "warm": 104.0,
        "ended": 112.0,
        "frames": 40,
        "every": 60,
        "decoding": 2.0,
        "reports": [report(4), report(5), report(6, 4.0)],
        "marks": [(-8, 104.0), (4, 105.5), (8, 106.0), (16, 108.0), (24, 112.0)],
        "starts": [104.0, 105.0, 107.5],
    }
    return Timings(**(values | changes))


def test_numbers_mean_what_their_words_say() -> None:
    found = summary([timings()], 1)
    assert found["chunks"] == 3 and found["frames"] == 24
    assert found["dit_fps"] == pytest.approx(24 / 3)
    assert found["decode_fps"] == pytest.approx(40 / 2)
    assert found["e2e_fps"] == pytest.approx(24 / 8)
    assert found["e2e_seconds"] == {"16": pytest.approx(4.0)}
    assert found["all_fps"] == pytest.approx(60 / (3 + 12))
    assert found["first_frame_seconds"] == pytest.approx(1.5)
    assert found["chunk_seconds"] == {"p50": 2.0, "p90": 4.0}
    assert found["latency_seconds"] == {"p50": 3.0, "p90": 4.5}
    parts = {"text": 0.1, "prologue": 0.25, "step": 0.75, "commit": 0.25, "waiting": 0.5}
    parts |= {"outside": (8 - 3 * (0.1 + 1.25 + 0.5)) / 3, "decode": 0.4, "deliver": 0.1}
    assert found["chunk_parts"] == pytest.approx(parts)
    assert found["outside_share"] == pytest.approx((8 - 3 * (0.1 + 1.25 + 0.5) + 3 * 0.1) / 8)


def test_rates_are_medians_and_percentiles_are_over_all_runs() -> None:
    last = timings(ended=124.0, reports=[report(4, 9.0)], starts=[104.0])
    runs = [timings(), timings(ended=108.0), last]
    found = summary(runs, 1)
    assert found["e2e_fps"] == pytest.approx(24 / 8) and found["e2e_seconds"] == {}
    assert found["chunks"] == 7
    assert found["chunk_seconds"] == {"p50": 2.0, "p90": 9.0}


def test_a_stream_record_reads_whole() -> None:
    result = {
        "name": "tiny_stream",
        "recipe": "0123456789ab",
        "ran": {"transformer": "cpu, float32, paged_attention sdpa"},
        "text": {"device": "cpu", "counted": False},
        "steps": 4,
        "runs": 1,
        "warm_up": {"chunks": 4, "loading_seconds": 3.0, "seconds": 4.0},
        **summary([timings()], 1),
        "memory": {
            "planned": {"cpu": {"weights": 3 << 20, "cache pages": 1 << 20}},
            "peak": {"process": 5 << 30},
        },
    }
    read = text(make_record("stream", "lltk bench stream tiny_stream", METHOD, [result]))
    numbers = "8.0 | 20.0 | 3.0 | 1.50 | 2.000 | 4.000 | 3.00 | 34.4%"
    assert f"| tiny_stream | {numbers} | process 5.0 GiB |" in read
    for said in (
        "4 chunks of warm-up", "text encoded on cpu, before the stream, not counted",
        "paged_attention sdpa", "| cpu | cache pages | 1.0 MiB |", "0123456789ab",
    ):  # fmt: skip
        assert said in read


@pytest.fixture
def run(run: Run) -> Run:
    """Run ``lltk bench``; exit code, output, errors."""
    return partial(run, "bench")


def test_a_recipe_is_measured(run: Run, tmp_path: Path) -> None:
    """The run has three chunks, the first of which warms up. Times are not compared."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    options = ["--seconds", "2", "--warmup", "1", "--runs", "1", "--device", "cpu", "--json"]
    for change in (*SIZES, f"stream.pipeline={pipeline}", "stream.steps=1"):
        options += ["--set", change]
    code, out, err = run("stream", "tiny_stream", *options, "-o", tmp_path / "record")
    assert code == 0, err
    record = Record.model_validate_json(out)
    assert (tmp_path / "record.json").read_text() == record.model_dump_json(indent=2) + "\n"
    assert (tmp_path / "record.md").read_text() == text(record)
    (result,) = record.results
    assert (result["name"], result["chunks"], result["frames"]) == ("tiny_stream", 2, 16)
    assert result["implementations"] == {"paged_attention": "sdpa"}
    assert result["memory"]["planned"].keys() == {"cpu"}
    assert 0 < result["outside_share"] < 1
    assert "--warmup 1" in record.command


def test_random_weights_need_no_files(run: Run, tmp_path: Path) -> None:
    options = ["--seconds", "1", "--warmup", "1", "--runs", "1", "--device", "cpu", "--json"]
    sizes = tiny_config(1, in_channels=24, out_channels=24)  # of the tiny decoder
    config = {key: value for key, value in sizes.items() if isinstance(value, int)}
    changes = [f"model.config={json.dumps(config)}", "stream.decoder.config=tiny_vae"]
    for change in (*SIZES, *changes, "stream.pipeline=nowhere", "stream.steps=1"):
        options += ["--set", change]
    line = ["stream", "tiny_stream", *options, "-o", tmp_path / "record"]
    code, out, err = run(*line, "--random-weights")
    assert code == 0, err
    record = Record.model_validate_json(out)
    assert record.results[0]["text"] == {"device": "random", "counted": False}
    assert "--random-weights" in record.command and "random embeddings" in text(record)
    code, _, err = run(*line)
    assert code == 2 and "nowhere" in err


def test_random_weights_follow_from_their_names() -> None:
    """So they are the same whatever passes there are."""
    steps = [*PASSES["stream"][:-2], "regionalise", "lower"]
    config = tiny_config(1, num_attention_heads=2, attention_head_dim=16)
    programs = [
        transform(make_recipe("stream", passes, config=config), weights=False)
        for passes in (steps, [*steps[:-2], "fp8_infer", *steps[-2:]])
    ]
    plain, packed = (with_random_weights(program) for program in programs)
    name = "blocks.0.attn1.to_q.weight"
    values = fp8_quantise(plain.weights[name])[0]
    assert torch.equal(packed.weights["blocks.0.attn1.to_q.weight_values"].float(), values.float())
    norms = plain.weights["blocks.0.norm2.weight"]
    assert 0.5 < float(norms.mean()) < 1.5 and plain.weights[name].std() < 1
    assert not torch.equal(plain.weights[name], plain.weights[name.replace("to_q", "to_k")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny_stream"], "-o: name the record's files"),
        (["tiny_steam", "-o", "x"], "did you mean 'tiny_stream'?"),
        (["tiny_stream", "-o", "x", "--runs", "0"], "--runs"),
        (["tiny_stream", "-o", "x", "--seconds", "0"], "--seconds"),
    ],
)
def test_bad_input_is_refused(run: Run, arguments: list[str], message: str) -> None:
    code, _, err = run("stream", *arguments)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_dry_run_measures_nothing(run: Run) -> None:
    config = {k: v for k, v in tiny_config(1, text_dim=64).items() if isinstance(v, int)}
    small = ["--set", f"model.config={json.dumps(config)}"]
    code, out, err = run("stream", "tiny_stream", *small, "--dry-run", "--json", "--device", "cpu")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["memory"]["cpu"]["weights"] > 0 and "sampler" in plan["plan"]


def test_help_has_an_example(run: Run) -> None:
    for arguments in (["--help"], ["stream", "--help"]):
        code, out, _ = run(*arguments)
        assert code == 0 and "lltk bench stream tiny_stream" in out.split("Example:")[1]


def test_one_rank_of_two_is_measured_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other process is there. The record says so, and how long a pass keeps the host."""
    recipe = make_recipe("stream", [*PASSES["stream"][:6], "ulysses_stream", *PASSES["stream"][6:]])
    path, record = tmp_path / "recipe.yaml", tmp_path / "record"
    stream = {"pipeline": "tiny", "fps": 8}
    path.write_text(json.dumps({**recipe.resolved(), "stream": stream}))
    script = Path(__file__).parents[1] / "benchmarks" / "dit.py"
    options = ["--rank-of", "2", "--device", "cpu", "--runs", "1", "-o", record]
    monkeypatch.setattr(sys, "argv", [*map(str, (script, path, *options))])
    runpy.run_path(str(script), run_name="__main__")
    made = json.loads(record.with_suffix(".json").read_text())
    assert "One process makes the passes of one rank of 2" in made["method"]
    for row in made["results"]:
        assert min(row[what]["median_ms"] for what in ("step", "host", "commit")) > 0
    assert "| host ms |" in record.with_suffix(".md").read_text()


def test_a_call_keeps_the_host_until_it_returns() -> None:
    found = launched(lambda: time.sleep(0.02), torch.device("cpu"), 2)
    assert 20 <= found["median_ms"] < 200


def test_a_passes_products_are_counted_and_timed() -> None:
    """Those of every layer, each by its implementation; attention is over a whole window."""
    steps = (*PASSES["stream"][:6], "nvfp4_cache", "fp8_infer", "fuse_attention_quantise")
    lower = {"fp8_quantise_attention": "fp8_decode", "fp8_matmul": "scaled_mm"}
    program = after(reached("stream", *steps, head_dim=16), "regionalise", {"lower": lower})
    spec, geometry = program.spec, program.geometry
    tokens, layers = geometry.chunk * geometry.frame_tokens(spec), spec.layers
    width, keys = spec.heads * spec.head_dim, geometry.pages * tokens
    found = products(program, "step")
    attends = find_implementation("fp8_quantise_attention", "fp8_decode")
    multiplies = find_implementation("fp8_matmul", "scaled_mm")
    attention = Product(True, attends, (tokens, keys, spec.heads, spec.head_dim))
    text = Product(True, None, (tokens, geometry.text_tokens, spec.heads, spec.head_dim))
    assert {each: n for each, n in found.items() if each.attends} == {
        attention: layers,
        text: layers,
    }
    assert found[Product(False, multiplies, (tokens, width, width))] >= 6 * layers
    assert sum(n for p, n in found.items() if p.implementation == multiplies) == 8 * layers
    assert attention.flops == 4 * tokens * keys * width
    assert Product(False, None, (2, 3, 5)).flops == 60
    plain = reached("stream", *PASSES["stream"], head_dim=16)
    timed = ceiling(plain, "step", torch.device("cpu"), 2)
    assert timed is not None
    for kind, part in timed.items():
        made = products(plain, "step").items()
        flops = sum(n * p.flops for p, n in made if p.attends == (kind == "attention"))
        assert part["tflop"] == pytest.approx(flops / 1e12) and part["ms"] > 0
    assert "has no linears and no attention" in refused(products, emptied(plain), "step")
    packed = reached("stream", *PASSES["stream"][:6], "nvfp4_infer", head_dim=16)
    assert "cannot be timed alone" in refused(products, packed, "step")
    assert ceiling(packed, "step", torch.device("cpu"), 2) is None


def emptied(program: Program) -> Program:
    """The program with graphs that hold no node."""
    program = after(program)
    for name in program.graphs:
        program.graphs[name] = fx.Graph()
    return program
