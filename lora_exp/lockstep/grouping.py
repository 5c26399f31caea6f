"""Which segments of a pass share a product: those whose bits are the same in it as alone.

Plain numbers and their classes; knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

STEP, STEPS = 8, 32  # the least step of a grid, and how many steps it has from one power of 2 on
FILLING = 1.25  # at most this many times the rows that are asked for


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
    """Share one layer's products among the segments of a pass, in as few as their classes allow.

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
    groups = []
    for kind in dict.fromkeys(classes):
        alike = sorted((i for i in everyone if classes[i] == kind), key=lambda i: (sizes[i], i))
        while alike:
            members, rows = _largest(alike, sizes, kind, class_of)
            groups.append(Group(tuple(sorted(members)), rows))
            alike = alike[len(members) :]
    return tuple(groups)


def _largest(
    alike: list[int],
    sizes: tuple[int, ...],
    kind: str | None,
    class_of: Callable[[int], str | None],
) -> tuple[list[int], int]:
    """Return the most of some segments that fit one product of their class, and its rows."""
    for count in range(len(alike), 1, -1) if kind is not None else ():
        needed = sum(sizes[i] for i in alike[:count])
        rows = on_grid(needed)
        while rows <= max(needed * FILLING, on_grid(needed)):
            if class_of(rows) == kind:
                return alike[:count], rows
            rows = on_grid(rows + 1)
    return alike[:1], sizes[alike[0]]


def on_grid(rows: int) -> int:
    """Return the next number of rows on a grid: few numbers, at most a few hundredths too large.

    What is measured for each number of rows is measured for these only.
    """
    step = max(STEP, (1 << (rows - 1).bit_length()) // 2 // STEPS)
    return -(-rows // step) * step
