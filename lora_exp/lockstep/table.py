"""A pack on one screen: a row for each job, and the tokens per second of all jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from rich import get_console
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from lora_exp.record.console import console as run_console

EVERY_S = {True: 0.25, False: 15.0}  # on a terminal, and in a log


@dataclass
class Row:
    """One job's row of the table; implements `Board`."""

    number: int
    name: str
    status: str = "waits"
    first: int = 0  # the step from which a resumed job goes on
    step: int = 0
    steps: int = 0
    shown: dict[str, str] = field(default_factory=dict)

    def begin(self, step: int, steps: int) -> None:
        """Training begins, or resumes."""
        self.status, self.first, self.step, self.steps = "trains", step, step, steps

    def move(self, step: int) -> None:
        """A step has ended."""
        self.step = step

    def write(self, line: str, shown: dict[str, str]) -> None:
        """There are new metrics."""
        self.shown = shown

    def close(self) -> None:
        """Training has ended or failed."""
        self.status = "ends"


class Table:
    """The rows of a pack: redrawn on a terminal, summarised in a line every 15 s in a log."""

    def __init__(self, title: str, rows: list[Row], trained_tokens: list[int]) -> None:
        """Create the table.

        Args:
            title: above the rows.
            rows: one for each job.
            trained_tokens: a list of one number, the tokens trained so far.
        """
        self.title, self.rows, self.trained_tokens = title, rows, trained_tokens
        self.console = Console()
        if not self.console.is_terminal:
            self.console = Console(width=140)
        self.began = self.drawn = time.perf_counter()
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Show the table; what the jobs print goes only to their run.log."""
        consoles = run_console, get_console()  # the latter is used by rich's progress bars
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
        """Redraw, if it is time."""
        now = time.perf_counter()
        if now - self.drawn < EVERY_S[self.console.is_terminal]:
            return
        self.drawn = now
        if self.console.is_terminal:
            self.live.update(self._rendered(), refresh=True)
        else:
            self.console.print(self._summary())

    def ended(self, row: Row, status: str, reason: str = "") -> None:
        """Set a job's final status; print it if there is no terminal.

        Args:
            row: the job's.
            status: as in run.json.
            reason: why it ended early, if it did; no more of its steps are expected then.
        """
        row.status = f"{status}: {reason}" if reason else status
        if reason:
            row.steps = row.step
        if not self.console.is_terminal:
            loss = f"  loss {row.shown['loss']}" if "loss" in row.shown else ""
            at = "" if reason else f" at step {row.step}"
            line = f"job {row.number} ({row.name}): {row.status}{at}{loss}"
            self.console.print(Text(line))

    def _rendered(self) -> RenderableType:
        table = RichTable(title=self.title, title_justify="left", caption=self._summary())
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

    def _summary(self) -> str:
        steps = sum(row.step for row in self.rows)
        total = sum(row.steps for row in self.rows)
        ended = sum(row.status not in ("waits", "trains", "ends") for row in self.rows)
        speed = self.trained_tokens[0] / (time.perf_counter() - self.began)
        text = f"{ended} of {len(self.rows)} jobs done, step {steps:,} of {total:,}"
        return f"{text}, {speed:,.0f} tokens/s together{self._left()}"

    def _left(self) -> str:
        """Return the expected time of the remaining steps; a waiting job has as many as others."""
        begun = [row for row in self.rows if row.steps]
        done = sum(row.step - row.first for row in begun)
        left = sum(row.steps - row.step for row in begun if row.status == "trains")
        if waiting := sum(row.status == "waits" for row in self.rows):
            left += waiting * sum(row.steps for row in begun) // max(len(begun), 1)
        if not done or not left:
            return ""
        seconds = round((time.perf_counter() - self.began) / done * left)
        return f", {timedelta(seconds=seconds)} left"
