"""Output for the terminal: text, tables and numbers. Needs no torch."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text

log = logging.getLogger("lora_exp")
console = Console()
if not console.is_terminal:
    console = Console(width=140)  # a log file: lines long enough for paths
BARS = "▁▂▃▄▅▆▇█"
T = TypeVar("T")


def print_and_log(renderable: RenderableType) -> None:
    """Print to the terminal, and write the same text to run.log."""
    if not console.quiet:  # it would render all the same
        console.print(renderable)
    plain = Console(file=io.StringIO(), width=100, no_color=True)
    plain.print(renderable)
    assert isinstance(plain.file, io.StringIO)
    log.info("%s", plain.file.getvalue().rstrip())


def tracked(sequence: Sequence[T], what: str, done: int = 0) -> Iterable[T]:
    """Yield items while a progress bar moves, if there is a terminal.

    Args:
        sequence: the items left to process.
        what: the text beside the bar.
        done: how many items were processed before.
    """
    total, hidden = done + len(sequence), not console.is_terminal
    return track(sequence, what, total, done, console=console, transient=True, disable=hidden)


def facts(title: str, lines: Mapping[str, str | Text]) -> Table:
    """Return a two-column table of names and values."""
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in lines.items():
        table.add_row(key, Text(value) if isinstance(value, str) else value)
    return table


def curve(values: list[float], width: int = 40) -> str:
    """Draw values as a line of at most `width` bars, each the mean of its values."""
    if not values:
        return ""
    width = min(width, len(values))
    cuts = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)


def short(value: float) -> str:
    """Format a number for a table."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(count: int) -> str:
    """Format a number of bytes."""
    if count < 2**20:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
