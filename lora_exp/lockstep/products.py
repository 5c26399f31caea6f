"""Which segments of a pass share a product: those whose bits are the same as alone.

Works on numbers of rows and their classes; knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

STEP, STEPS = 8, 32  # the smallest step of the grid, and the steps from one power of 2 to the next
MAX_FILLING = 1.25  # a product has at most so many times the rows needed, or one grid step more
APART = "apart"  # the class of numbers of rows that share no product: bits depend on a row's place
Sizes = tuple[int, ...]
RowsOf = Callable[[list[int]], int | None]
Strategy = Callable[[list[int], Sizes, RowsOf], "list[Group]"]


@dataclass(frozen=True)
class Group:
    """Segments that share a product, or one that is computed in its own shape."""

    members: tuple[int, ...]  # their indices in the pass
    rows: int  # of the product; rows beyond those of the members are zeros
    own_shape: bool = False  # whether the only member is computed as in a run alone

    def is_whole_pass(self, segments: Sequence[Any], rows: int) -> bool:
        """Return whether this product is of all tokens of a pass, side by side."""
        return not self.own_shape and len(self.members) == len(segments) and self.rows == rows


def group(
    sizes: Sizes, total: int, class_of: Callable[[int], str | None], own_sizes: Sizes | None = None
) -> tuple[Group, ...]:
    """Split the segments of a pass into few products of one layer, with the same bits as alone.

    Args:
        sizes: each segment's number of rows.
        total: number of rows of the pass, its filling included.
        class_of: the class of a number of rows, which decides its bits; None: rows depend on each
            other.
        own_sizes: each segment's number of rows in a run alone, if the pass leaves some out.

    Returns:
        Groups that have each segment once: one group of all, with `total` rows, if possible. No
        groups if rows depend on each other, and those left out might matter.
    """
    all_members, own_sizes = tuple(range(len(sizes))), own_sizes or sizes
    if len(sizes) == 1 and sizes == own_sizes:
        return (Group(all_members, sizes[0], own_shape=True),)
    classes = [class_of(size) for size in own_sizes]
    if None in classes and sizes != own_sizes:
        return ()
    if not {None, APART} & {*classes} and {*classes} == {class_of(total)}:
        return (Group(all_members, total),)
    groups: list[Group] = []
    for row_class in dict.fromkeys(classes):
        same_class = sorted(
            (i for i in all_members if classes[i] == row_class), key=lambda i: (sizes[i], i)
        )
        strategies: list[Strategy] = (
            [_alone] if row_class in (None, APART) else [_most_first, _largest_first]
        )
        rows_of = partial(_product_rows, row_class=row_class, class_of=class_of)
        fewest: list[Group] = min(
            [strategy(same_class, sizes, rows_of) for strategy in strategies], key=len
        )
        groups += fewest
    return tuple(
        Group(g.members, own_sizes[g.members[0]], own_shape=True) if len(g.members) == 1 else g
        for g in groups
    )


def _alone(same_class: list[int], sizes: Sizes, rows_of: RowsOf) -> list[Group]:
    return [Group((i,), sizes[i]) for i in same_class]


def _most_first(same_class: list[int], sizes: Sizes, rows_of: RowsOf) -> list[Group]:
    """Put as many segments as fit, the smallest first, into each product."""
    groups = []
    while same_class:
        for count in range(len(same_class), 0, -1):
            rows = rows_of([sizes[i] for i in same_class[:count]])
            if rows is not None:
                break
        groups.append(Group(tuple(sorted(same_class[:count])), rows or sizes[same_class[0]]))
        same_class = same_class[count:]
    return groups


def _largest_first(same_class: list[int], sizes: Sizes, rows_of: RowsOf) -> list[Group]:
    """Put each segment, the largest first, into the first product that it fits."""
    groups: list[Group] = []
    for i in reversed(same_class):
        for at, g in enumerate(groups):
            members = tuple(sorted((*g.members, i)))
            rows = rows_of([sizes[j] for j in members])
            if rows is not None:
                groups[at] = Group(members, rows)
                break
        else:
            groups.append(Group((i,), sizes[i]))
    return groups


def _product_rows(
    sizes: list[int], row_class: str | None, class_of: Callable[[int], str | None]
) -> int | None:
    """Return the rows of a product of some segments, so that its class is theirs; None: no such."""
    needed = sum(sizes)
    if len(sizes) == 1:
        return needed
    rows = on_grid(needed)
    while rows <= max(needed * MAX_FILLING, on_grid(needed)):
        if class_of(rows) == row_class:
            return rows
        rows = on_grid(rows + 1)
    return None


def on_grid(rows: int) -> int:
    """Round a number of rows up to a grid, so that few numbers have to be measured.

    Up to 256 rows these are the multiples of 8; above, the result is at most 4% larger.
    """
    step = max(STEP, (1 << (rows - 1).bit_length()) // 2 // STEPS)
    return -(-rows // step) * step
