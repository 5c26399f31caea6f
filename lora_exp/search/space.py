"""The space of a search, read from Hydra's own override grammar.

`a,b,c`, `choice()` and `glob()` are options, `range()` ordered ones (its end excluded, as in a
grid), `interval()` numbers between two ends, `int(interval())` whole ones with both ends.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    IntervalSweep,
    Override,
    RangeSweep,
    Transformer,
)

from lora_exp.errors import ConfigError

LOG = "log"
COUNTABLE = 100  # whole numbers of an interval that are tried one by one
DIGITS = 4  # of an interval's width, or of a value on a logarithmic scale


@dataclass(frozen=True)
class Dimension:
    """One key of a space: its options, or the ends of its interval."""

    key: str  # as in the override, with its sign
    options: tuple[str, ...] = ()  # texts of overrides; none: an interval
    ordered: bool = False  # neighbouring options are alike
    low: float = 0.0
    high: float = 0.0
    whole: bool = False  # whole numbers only
    log: bool = False

    def text(self, value: float) -> str:
        """Return a number of the interval as an override's text, with `DIGITS` digits."""
        if self.whole:
            return str(round(value))
        width = self.high - self.low
        scale = min(abs(value), width) if self.log else width
        rounded = round(value, DIGITS - 1 - math.floor(math.log10(scale)))
        return str(min(max(rounded, self.low), self.high))

    def number(self, text: str) -> float | None:
        """Return a text as a number of the interval; None: it is outside, or no number."""
        try:
            value = float(text)
        except ValueError:
            return None
        inside = self.low <= value <= self.high and (value.is_integer() or not self.whole)
        return value if inside else None

    def holds(self, text: str) -> bool:
        """Return whether an override's text is a value of this dimension."""
        return text in self.options if self.options else self.number(text) is not None

    def at(self, share: float) -> str:
        """Return the value at a share of the dimension, in [0, 1)."""
        if self.options:
            return self.options[int(share * len(self.options))]
        low, high = self.low, self.high + (1 if self.whole else 0)
        value = low * (high / low) ** share if self.log else low + (high - low) * share
        return self.text(math.floor(value) if self.whole else value)

    @property
    def asked(self) -> list[Any]:
        """The options or the interval, in values fit for JSON."""
        interval = [self.low, self.high, self.whole, self.log]
        return list(self.options) or interval

    def cells(self) -> Sequence[str] | None:
        """Return all values; None: there are too many to count."""
        if self.options:
            return self.options
        whole = range(int(self.low), int(self.high) + 1)
        return [str(n) for n in whole] if self.whole and len(whole) <= COUNTABLE else None

    def __str__(self) -> str:
        if self.options:
            return ", ".join(self.options)
        ends = f"{self.low:g} to {self.high:g}"
        kinds = [("whole numbers", self.whole), ("logarithmic", self.log)]
        return ", ".join([ends, *(name for name, applies in kinds if applies)])


@dataclass(frozen=True)
class Space:
    """What a search varies, and the overrides that all its trials have."""

    dimensions: tuple[Dimension, ...]
    groups: tuple[str, ...]  # keys of dimensions that choose a group's option
    common: tuple[str, ...]

    def __getitem__(self, key: str) -> Dimension:
        return next(d for d in self.dimensions if d.key == key)

    def cells(self) -> Iterator[dict[str, str]] | None:
        """Return all cells, in the order of Hydra's grid; None: they cannot be counted."""
        values = [dimension.cells() for dimension in self.dimensions]
        if any(v is None for v in values):
            return None
        keys = [dimension.key for dimension in self.dimensions]
        return (dict(zip(keys, c, strict=True)) for c in itertools.product(*values))  # type: ignore[arg-type]


def read_space(overrides: Sequence[Override], groups: Mapping[str, bool]) -> Space:
    """Return the space that overrides describe; of a key given twice the last override counts.

    Args:
        overrides: parsed by Hydra, those of a preset first.
        groups: whether a key is that of a config group.

    Raises:
        ConfigError: nothing is swept, or an interval, range or tag makes no sense.
    """
    last = {override.get_key_element(): override for override in overrides}
    faults: list[tuple[str, str]] = []
    dimensions = []
    for key, override in last.items():
        if override.is_sweep_override():
            dimension = _dimension(key, override)
            faults += [(key.lstrip("+"), text) for text in _faults(dimension, override)]
            if not dimension.options and groups[override.key_or_group]:
                faults.append((key, "is a group: give its options, or glob(*)"))
            dimensions.append(dimension)
    if not dimensions:
        text = "nothing to search; give a key several values, like peft.r=4,8,16 or"
        faults.append(("hydra/sweeper=search", f'{text} "peft.r=int(interval(4,64))"'))
    if faults:
        raise ConfigError(faults)
    return Space(
        tuple(dimensions),
        tuple(d.key for d in dimensions if groups[last[d.key].key_or_group]),
        tuple(_text(key, o) for key, o in last.items() if not o.is_sweep_override()),
    )


def _text(key: str, override: Override) -> str:
    if override.is_delete() and override.value_type is None:
        return key
    return f"{key}={override.get_value_element_as_str()}"


def _dimension(key: str, override: Override) -> Dimension:
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        low, high = float(sweep.start), float(sweep.end)
        return Dimension(key, low=low, high=high, whole=whole, log=LOG in sweep.tags)
    if isinstance(sweep, ChoiceSweep):  # in the order given, also if it asks for a random one
        values: Iterable[str] = map(Transformer.str, sweep.list)
    elif isinstance(sweep, RangeSweep):
        values = map(Transformer.str, sweep.range()) if sweep.step else ()
    else:
        values = override.sweep_string_iterator()
    return Dimension(key, tuple(dict.fromkeys(values)), isinstance(sweep, RangeSweep))


def _faults(dimension: Dimension, override: Override) -> Iterator[str]:
    """Yield what is wrong with a dimension."""
    tags: set[str] = getattr(override.value(), "tags", set())
    is_interval = override.is_interval_sweep()
    if unknown := sorted(tags - {LOG}):
        yield f"the tag {', '.join(unknown)} is unknown; there is tag(log, interval(1e-5,1e-2))"
    if not is_interval:
        if LOG in tags:
            yield "options have no scale; give tag(log, interval(...)), or leave the tag out"
        if not dimension.options:
            yield "has no values: the range is empty, or no option matches"
        return
    low, high = dimension.low, dimension.high
    if not math.isfinite(low) or not math.isfinite(high):
        yield "an interval has two finite ends"
    elif low >= high:
        yield f"an interval from {low:g} to {high:g} is empty; give the lower end first"
    elif dimension.log and low <= 0:
        yield f"a logarithmic interval has ends above 0, not {low:g}"
