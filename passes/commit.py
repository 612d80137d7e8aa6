"""The stream's commit: a pass over the finished chunk that writes its K/V into a page."""

from __future__ import annotations

import torch
from torch import fx

from lltk.graph.contract import Role
from lltk.graph.edit import (
    add_input,
    building,
    calls,
    copy_graph,
    drop_unused_inputs,
    input_of,
    module_of,
    output,
    prune,
    shape,
)
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.spec import LinearRole
from lltk.graph.stages import Stage
from lltk.ops.implementations import overload

aten = torch.ops.aten
PAGED_ATTENTION = overload("paged_attention")
WRITE_PAGE = overload("write_page")


class Config(PassConfig):
    """Nothing to configure."""


class Commit(Pass[Config]):
    """Derive the commit from the step: at t = 0 it writes K/V to a page and returns nothing.

    ::

        paged_attention(q, k, v, k_pages_i, v_pages_i, table)
            →  the same, and write_page(k_pages_i, k, slot), write_page(v_pages_i, v, slot)
        return {"sample": …}  →  return {}, without what only the sample needed

    The last block ends at its K/V, so the commit does not read its cross-attention's K/V. ``slot``
    is the page to write, int64 [1] on the pages' device.
    """

    Config = Config
    reads = (Stage.CANONICAL,)
    leaves = Stage.CAUSAL
    kinds = ("stream",)
    numerics = Numerics.BITWISE

    def requires(self, program: Program) -> None:
        step = program.graphs.get("step")
        if step is None or not calls(step, PAGED_ATTENTION):
            raise ValueError("there is no step over pages; put cached_step before it in the recipe")

    def apply(self, program: Program, report: Report) -> None:
        graph = copy_graph(program.graphs["step"])
        slot = add_input(graph, "slot", torch.empty(1, dtype=torch.int64, device="meta"), Role.SLOT)
        end = output(graph)
        for node in calls(graph, PAGED_ATTENTION):
            _, k, v, k_pages, v_pages, _ = node.args
            with building(end, module_of(node)) as build:
                build(WRITE_PAGE, k_pages, k, slot)
                build(WRITE_PAGE, v_pages, v, slot)
            report.match("pages", 2)
        end.args = ({},)
        _clean_time(graph)
        report.match("dead", prune(graph))
        drop_unused_inputs(graph)
        program.graphs["commit"] = graph

    def ensures(self, program: Program) -> None:
        spec, read = program.spec, program.graphs["commit"].find_nodes(op="get_attr")
        last = [
            role
            for node in read
            if spec.layer_of(str(node.target)) == spec.layers - 1
            and (role := spec.linear_role(str(node.target).rpartition(".")[0])) is not None
        ]
        extra = set(last) - {LinearRole.SELF_KEY, LinearRole.SELF_VALUE}
        assert not extra, f"the commit's last block still computes {', '.join(sorted(extra))}"


def _clean_time(graph: fx.Graph) -> None:
    """Let zeros, made on the latents' device, stand in for the timesteps."""
    time, latents = input_of(graph, Role.TIME), input_of(graph, Role.LATENTS)
    dtype = time.meta["val"].dtype
    options = {} if dtype == latents.meta["val"].dtype else {"dtype": dtype}
    first = next(node for node in graph.nodes if node in time.users)
    with building(first, "") as build:
        zeros = build(aten.new_zeros.default, latents, list(shape(time)), **options)
    zeros.meta["role"] = Role.TIME
    time.replace_all_uses_with(zeros)
