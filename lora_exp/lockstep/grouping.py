"""Which segments of a pass share a product: those whose bits are the same in it as alone.

Plain numbers and their classes; knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

STEP, STEPS = 8, 32  # the least step of a grid, and how many steps it has from one power of 2 on
FILLING = 1.25  # at most this many times the rows that are asked for, or the next step of the grid
Sizes = tuple[int, ...]
Rows = Callable[[list[int]], int | None]
Way = Callable[[list[int], Sizes, Rows], "list[Group]"]


@dataclass(frozen=True)
class Group:
    """Segments that share a product; one alone is computed in its own shape."""

    members: tuple[int, ...]  # their places in the pass
    rows: int  # of the product; those that are no member's are zeros

    def of_all(self, segments: Sequence[Any], rows: int) -> bool:
        """Say whether several segments make up this product, in the order of the pass."""
        return len(self.members) == len(segments) > 1 and self.rows == rows


def group(
    sizes: tuple[int, ...], total: int, class_of: Callable[[int], str | None]
) -> tuple[Group, ...]:
    """Split the segments of a pass into few products of one layer, with the same bits as alone.

    Args:
        sizes: each segment's number of rows.
        total: of the pass: theirs, and what fills it up.
        class_of: numbers of rows of one class are computed with the same bits; None is alone.

    Returns:
        Groups that hold each segment once; one of them all, with `total` rows, where that may be.
    """
    everyone = tuple(range(len(sizes)))
    if len(sizes) == 1:
        return (Group(everyone, sizes[0]),)
    classes = [class_of(size) for size in sizes]
    if None not in classes and set(classes) == {class_of(total)}:
        return (Group(everyone, total),)
    groups: list[Group] = []
    for kind in dict.fromkeys(classes):
        alike = sorted((i for i in everyone if classes[i] == kind), key=lambda i: (sizes[i], i))
        ways: list[Way] = [_alone] if kind is None else [_most_first, _largest_first]
        rows_of = partial(_rows, kind=kind, class_of=class_of)
        fewest: list[Group] = min([way(alike, sizes, rows_of) for way in ways], key=len)
        groups += fewest
    return tuple(groups)


def _alone(alike: list[int], sizes: Sizes, rows_of: Rows) -> list[Group]:
    return [Group((i,), sizes[i]) for i in alike]


def _most_first(alike: list[int], sizes: Sizes, rows_of: Rows) -> list[Group]:
    """Make each product of as many of the smallest segments as fit."""
    groups = []
    while alike:
        for count in range(len(alike), 0, -1):
            rows = rows_of([sizes[i] for i in alike[:count]])
            if rows is not None:
                break
        groups.append(Group(tuple(sorted(alike[:count])), rows or sizes[alike[0]]))
        alike = alike[count:]
    return groups


def _largest_first(alike: list[int], sizes: Sizes, rows_of: Rows) -> list[Group]:
    """Put each segment, the largest first, into the first product that it fits."""
    groups: list[Group] = []
    for i in reversed(alike):
        for at, g in enumerate(groups):
            members = tuple(sorted((*g.members, i)))
            rows = rows_of([sizes[j] for j in members])
            if rows is not None:
                groups[at] = Group(members, rows)
                break
        else:
            groups.append(Group((i,), sizes[i]))
    return groups


def _rows(
    together: list[int], kind: str | None, class_of: Callable[[int], str | None]
) -> int | None:
    """Return how many rows a product of some segments has in their class, None if it cannot."""
    needed = sum(together)
    if len(together) == 1:
        return needed
    rows = on_grid(needed)
    while rows <= max(needed * FILLING, on_grid(needed)):
        if class_of(rows) == kind:
            return rows
        rows = on_grid(rows + 1)
    return None


def on_grid(rows: int) -> int:
    """Return the next number of rows on a grid, for which alone such numbers are measured.

    Up to 256 rows these are the multiples of 8; above, at most 4% more than was asked for.
    """
    step = max(STEP, (1 << (rows - 1).bit_length()) // 2 // STEPS)
    return -(-rows // step) * step
