"""Changes of files and of plain data, drawn from a seed, for the fuzz tests."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from random import Random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 2**31, -(2**31), 2**63, 10**23, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "x", "0", "1e9", "../x", "/dev/zero", "\x00", "\ud800", "é" * 300, [], {},
    [[]], [1, "x"], {"": 0}, {"x": {"y": []}},
)  # fmt: skip
"""What may stand where something else should."""


def damaged(data: bytes, random: Random) -> bytes:
    """Bytes with some flipped, cut off, doubled, zeroed, or put in another place."""
    if not data:
        return bytes([random.randrange(256)])
    at, more = random.randrange(len(data)), random.randrange(1, 64)
    way = random.randrange(7)
    if way <= 1:
        changed = bytearray(data)
        for _ in range(random.choice((1, 1, 3, 20))):
            changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return bytes(changed)
    if way == 2:
        return data[:at]
    if way == 3:
        return data[:at] + data[at : at + more] + data[at:]
    if way == 4:
        return data[:at] + bytes(more) + data[at + more :]
    if way == 5:
        return data[at : at + more] + data[:at] + data[at + more :]
    return data[:at] + random.randbytes(more) + data[at:]


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in plain data."""
    yield path
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield from places(data[key], (*path, key))


def changed(data: Any, random: Random) -> Any:
    """Plain data with one value replaced, removed, moved or added."""
    data = copy.deepcopy(data)
    *above, last = random.choice([path for path in places(data) if path] or [(None,)])
    if last is None:
        return random.choice(VALUES)
    holder = data
    for key in above:
        holder = holder[key]
    way = random.randrange(5)
    if way == 0:
        del holder[last]
    elif way == 1 and isinstance(holder, dict):
        holder[random.choice(("x", "", "extends", str(last) + "s", "\ud800"))] = holder[last]
    elif way == 2:
        other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
    else:
        holder[last] = copy.deepcopy(random.choice(VALUES))
    return data
