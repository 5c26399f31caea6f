"""Where values stand in a figure: keys of any kind on an axis, objectives in a range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import quantiles
from typing import Any

from lora_exp.comparison.keys import text_of
from lora_exp.comparison.theme import plain, rounded
from lora_exp.runs.run import number

LEVELS = 8  # of a numeric key that are marked at its axis
LOGARITHM = 4  # largest over smallest number from which an axis is logarithmic
FAR = 3  # interquartile ranges beyond the quartiles: Tukey's outer fence
EDGE = 0.12  # of the range, where the values beyond it stand


class Axis:
    """Where the values of a key stand: numbers in their order, with a logarithm if they span much.

    Attributes:
        at: the position of each value.
        layout: plotly's axis.
        ticks: the positions that have a text.
    """

    def __init__(self, values: Sequence[Mapping[str, Any]], key: str) -> None:
        numbers = [number(by_key.get(key)) for by_key in values]
        if None in numbers:
            self._of_texts([text_of(by_key, key) for by_key in values])
        else:
            self._of_numbers([value for value in numbers if value is not None])

    def _of_texts(self, texts: Sequence[str]) -> None:
        levels = sorted(set(texts))
        self.at = [float(levels.index(text)) for text in texts]
        labels = [_cut(plain(level) or "-") for level in levels]
        self.ticks = dict(zip(labels, map(float, range(len(levels))), strict=True))
        self.layout: dict[str, Any] = {
            "tickvals": list(range(len(levels))), "ticktext": labels,
            "range": [-0.5, len(levels) - 0.5],
        }  # fmt: skip

    def _of_numbers(self, numbers: Sequence[float]) -> None:
        self.at = list(numbers)
        levels = sorted(set(numbers))
        low, high = levels[0], levels[-1]
        is_few = len(levels) <= LEVELS
        self.ticks = {f"{level:g}": level for level in (levels if is_few else (low, high))}
        self.layout = {"type": "log"} if low > 0 and high / low >= LOGARITHM else {}
        if is_few:
            self.layout |= {"tickvals": levels, "ticktext": list(self.ticks)}

    def apart(self) -> list[float]:
        """Return the positions, with those of equal values a little apart in their order."""
        low, high = min(self.at), max(self.at)
        is_log, seen = self.layout.get("type") == "log", dict.fromkeys(self.at, 0)
        places = []
        for at in self.at:
            count = self.at.count(at)
            shift = (seen[at] - (count - 1) / 2) * min(0.016, 0.12 / count)
            seen[at] += 1
            place = at * (high / low) ** shift if is_log else at + shift * ((high - low) or 1)
            places.append(rounded(place))
        return places

    def height(self, at: float) -> float:
        """Return a position as a share of the axis, 0 to 1."""
        low, high = min(self.at), max(self.at)
        if low == high:
            return 0.5
        if self.layout.get("type") == "log":
            return math.log(at / low) / math.log(high / low)
        return (at - low) / (high - low)


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest value to show: all but those beyond Tukey's outer fences."""
    low, high = min(values), max(values)
    if len(values) > 4:
        first, _, third = quantiles(values, n=4, method="inclusive")
        low = max(low, first - FAR * (third - first))
        high = min(high, third + FAR * (third - first))
    space = EDGE * (high - low) or abs(high) * EDGE or 1.0
    return low - space, high + space


def inside(value: float, range_: tuple[float, float]) -> float:
    """Return a value, or the nearer end of a range that it is not in."""
    return min(max(value, range_[0]), range_[1])


def _cut(text: str) -> str:
    return text if len(text) <= 18 else f"{text[:17]}…"
