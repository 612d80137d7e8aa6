"""One graph for a stream's step and its commit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx
from torch.fx.node import map_arg

from lltk.graph.contract import Role
from lltk.graph.edit import copy_graph, output, results_of, role_of
from lltk.graph.passes import Numerics, Pass, PassConfig, Report
from lltk.graph.program import Program
from lltk.graph.stages import Stage
from lltk.graph.verify import STEP_HIGH


class Config(PassConfig):
    """Nothing to configure."""


class JoinCommit(Pass[Config]):
    """Let the step give a commit's pages too, and drop the commit.

    ::

        step:    {sample: …}
        commit:  {new_k_pages_i: …, new_v_pages_i: …}, at t = 0
            →  step:  {sample: …, new_k_pages_i: …, new_v_pages_i: …}

    A commit is a step at t = 0, so it needs no graph of its own, and no second copy of the weights
    where every graph has its own. Whoever runs the graph as a commit gives timesteps of 0.

    This is so if the step, or else ``step_high``, computes everything that the commit makes of a
    parameter; only what makes a page of keys and values is added to it. A commit for which neither
    does, such as one in high precision beside a quantised step, stays as it is.
    """

    Config = Config
    reads = (Stage.CAUSAL, Stage.QUANTISED, Stage.PARTITIONED)
    kinds = ("stream",)
    numerics = Numerics.BITWISE
    optional = True

    def requires(self, program: Program) -> None:
        if "commit" not in program.graphs or not program.contract("commit").outputs:
            raise ValueError(
                "there is no commit that gives pages; put externalise before it in the recipe"
            )

    def apply(self, program: Program, report: Report) -> None:
        for name in ("step", STEP_HIGH):
            if name not in program.graphs:
                continue
            graph = copy_graph(program.graphs[name])
            if _join(graph, program.graphs["commit"], report):
                program.graphs[name] = graph
                del program.graphs["commit"]
                report.match("commit")
                return

    def ensures(self, program: Program) -> None:
        assert program.commit_graph in program.graphs, "no graph gives pages"


def _join(graph: fx.Graph, commit: fx.Graph, report: Report) -> bool:
    """Let a step's graph give a commit's results; False if a parameter had to be used anew."""
    known: dict[str, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        same[node] = known.setdefault(_key(node, same), node)
    end = output(graph)
    for node in commit.nodes:
        if node.op == "output":
            break
        found = known.get(_key(node, same))
        if found is None:
            used = [each.op for each in (node, *node.all_input_nodes)]
            if "get_attr" in used or node.op == "placeholder":
                report.miss(node, "the step computes no such value")
                return False
            with graph.inserting_before(end):
                found = graph.node_copy(node, same.__getitem__)
        same[node] = found
    pages = {name: same[node] for name, node in results_of(commit).items()}
    end.args = (results_of(graph) | pages,)
    return True


def _key(node: fx.Node, same: Mapping[fx.Node, fx.Node]) -> str:
    """A text that nodes of equal values have in common; a commit's times stand for a step's.

    Args:
        node: of either graph.
        same: of each node before it, the first one in the step of equal value.
    """
    if role_of(node) is Role.TIME:
        return str(Role.TIME)
    return f"{node.op} {node.target} {map_arg((node.args, node.kwargs), same.__getitem__)}"
