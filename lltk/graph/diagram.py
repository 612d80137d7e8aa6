"""A graph as an SVG drawing: a box for each module, an arrow where values flow."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from html import escape

from torch import fx

from lltk.files.outputs import marked
from lltk.graph.contract import Role
from lltk.graph.edit import module_of, role_of
from lltk.graph.text import target_name, type_text

DIAGRAM = marked("a diagram", "<desc>lltk diagram</desc>")
_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 240, 44, 24, 34, 32


@dataclass
class _Box:
    """A box of the drawing: consecutive nodes of one module, an input, or the output."""

    title: str
    detail: str
    kind: str
    sources: set[int] = field(default_factory=set)
    rank: int = 0
    column: int = 0


def draw(graph: fx.Graph, name: str) -> str:
    """SVG text of a graph; parameters are not drawn."""
    boxes = _boxes(graph)
    for box in boxes:
        box.rank = 1 + max((boxes[source].rank for source in box.sources), default=-1)
    for index, box in enumerate(boxes):
        if box.kind == "input":
            readers = (reader.rank for reader in boxes if index in reader.sources)
            box.rank = max(min(readers, default=1) - 1, 0)
    taken: Counter[int] = Counter()
    for box in sorted(boxes, key=lambda box: box.kind == "input"):
        box.column = taken[box.rank]
        taken[box.rank] += 1
    return _svg(boxes, name, max(taken.values(), default=1))


def _boxes(graph: fx.Graph) -> list[_Box]:
    boxes: list[_Box] = []
    of: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr" or role_of(node) is Role.PARAMETER:
            continue
        if node.op == "placeholder":
            box = _Box(node.name, type_text(node.meta["val"]), "input")
            boxes.append(box)
        elif node.op == "output":
            box = _Box("output", "", "output")
            boxes.append(box)
        elif boxes and boxes[-1].kind == "call" and boxes[-1].title == (module_of(node) or "block"):
            box = boxes[-1]
        else:
            box = _Box(module_of(node) or "block", "", "call")
            boxes.append(box)
        of[node] = len(boxes) - 1
        box.sources |= {of[s] for s in node.all_input_nodes if s in of} - {len(boxes) - 1}
        if box.kind == "call":
            box.detail = _detail(box.detail, node)
    return boxes


def _detail(before: str, node: fx.Node) -> str:
    name = target_name(node).removeprefix("aten.").rpartition(".")[0] or target_name(node)
    name = name.rpartition(".")[2]
    if name in ("getitem", "") or name in before.split(", "):
        return before
    return f"{before}, {name}" if before else name


def _svg(boxes: list[_Box], name: str, columns: int) -> str:
    def corner(box: _Box) -> tuple[int, int]:
        return (
            _MARGIN + box.column * (_WIDTH + _GAP_X),
            2 * _MARGIN + box.rank * (_HEIGHT + _GAP_Y),
        )

    width = 2 * _MARGIN + columns * (_WIDTH + _GAP_X)
    height = 3 * _MARGIN + (1 + max(box.rank for box in boxes)) * (_HEIGHT + _GAP_Y)
    fill = {"input": "#e8f1fb", "call": "#ffffff", "output": "#e9f7e9"}
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#888"/></marker></defs>',
        "<desc>lltk diagram</desc>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="{_MARGIN}" font-weight="bold">{escape(name)}</text>',
    ]
    for box in boxes:
        x, y = corner(box)
        for source in sorted(box.sources):
            from_x, from_y = corner(boxes[source])
            lines.append(_arrow((from_x, from_y), (x, y)))
    for box in boxes:
        x, y = corner(box)
        lines.append(
            f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="5" '
            f'fill="{fill[box.kind]}" stroke="#444444"/>'
            f'<text x="{x + 8}" y="{y + 18}" font-weight="bold">{escape(box.title)}</text>'
            f'<text x="{x + 8}" y="{y + 35}" fill="#555555">{escape(_short(box.detail))}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _arrow(source: tuple[int, int], target: tuple[int, int]) -> str:
    """An arrow between boxes; it goes round boxes in its own column on the left."""
    passes = source[0] == target[0] and target[1] - source[1] > _HEIGHT + _GAP_Y
    if passes:
        start, end = (source[0], source[1] + _HEIGHT // 2), (target[0], target[1] + _HEIGHT // 2)
        out = (start[0] - _MARGIN, end[0] - _MARGIN)
        curve = f"{out[0]},{start[1] + _MARGIN} {out[1]},{end[1] - _MARGIN}"
    else:
        start = (source[0] + _WIDTH // 2, source[1] + _HEIGHT)
        end = (target[0] + _WIDTH // 2, target[1])
        bend = (end[1] - start[1]) // 2
        curve = f"{start[0]},{start[1] + bend} {end[0]},{end[1] - bend}"
    return (
        f'<path d="M{start[0]},{start[1]} C{curve} {end[0]},{end[1]}" fill="none" '
        'stroke="#aaaaaa" marker-end="url(#tip)"/>'
    )


def _short(text: str, limit: int = 34) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
