"""A pack on one screen: a row for each job, all its jobs' tokens per second below."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich import get_console
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from lora_exp.record.console import console as ours

EVERY_S = {True: 0.25, False: 15.0}  # on a terminal, and in a log


@dataclass
class Row:
    """One job's line; a `Board`."""

    number: int
    name: str
    status: str = "waits"
    step: int = 0
    steps: int = 0
    shown: dict[str, str] = field(default_factory=dict)

    def begin(self, step: int, steps: int) -> None:
        """Training begins, or goes on."""
        self.status, self.step, self.steps = "trains", step, steps

    def move(self, step: int) -> None:
        """A step is done."""
        self.step = step

    def write(self, line: str, shown: dict[str, str]) -> None:
        """There are new numbers."""
        self.shown = shown

    def close(self) -> None:
        """Training is over, or given up."""
        self.status = "ends"


class Table:
    """The rows of a pack, redrawn on a terminal, a line now and then in a log."""

    def __init__(self, title: str, rows: list[Row], counted: list[int]) -> None:
        """Make a table.

        Args:
            title: stands above it.
            rows: the jobs.
            counted: one number: the tokens trained so far.
        """
        self.title, self.rows, self.counted = title, rows, counted
        self.console = Console()
        if not self.console.is_terminal:
            self.console = Console(width=140)
        self.began = self.drawn = time.perf_counter()
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Show the table; the jobs' own words go to their run.log only."""
        consoles = ours, get_console()  # the latter of rich's own progress bars
        for console in consoles:
            console.quiet = True
        if self.console.is_terminal:
            self.live.start()
        try:
            yield
        finally:
            for console in consoles:
                console.quiet = False
            self.live.stop()

    def tick(self) -> None:
        """Redraw, if the last time is long enough ago."""
        now = time.perf_counter()
        if now - self.drawn < EVERY_S[self.console.is_terminal]:
            return
        self.drawn = now
        if self.console.is_terminal:
            self.live.update(self._drawn(), refresh=True)
        else:
            self.console.print(self._summed())

    def ended(self, row: Row, status: str) -> None:
        """Set a job's last status, and say so where nothing is redrawn."""
        row.status = status
        if not self.console.is_terminal:
            loss = f"  loss {row.shown['loss']}" if row.shown else ""
            told = f"job {row.number} ({row.name}): {status} at step {row.step}{loss}"
            self.console.print(Text(told))

    def _drawn(self) -> RenderableType:
        table = RichTable(title=self.title, title_justify="left", caption=self._summed())
        for column in ("job", "name", "step", "", "loss", "rate", "evaluation", "status"):
            table.add_column(column, justify="right" if column in ("step", "loss") else "left")
        for row in self.rows:
            table.add_row(
                str(row.number),
                Text(row.name),
                f"{row.step}/{row.steps}" if row.steps else "",
                ProgressBar(total=row.steps or 1, completed=row.step, width=16),
                row.shown.get("loss", ""),
                row.shown.get("rate", ""),
                row.shown.get("eval", "").strip().removeprefix("eval "),
                row.status,
            )
        return table

    def _summed(self) -> str:
        steps = sum(row.step for row in self.rows)
        total = sum(row.steps for row in self.rows)
        over = sum(row.status not in ("waits", "trains", "ends") for row in self.rows)
        speed = self.counted[0] / (time.perf_counter() - self.began)
        text = f"{over} of {len(self.rows)} jobs done, step {steps:,} of {total:,}"
        return f"{text}, {speed:,.0f} tokens/s together"
