"""Jobs on one screen: a row for each, and the tokens per second of all.

The rows of a pack are shown by its process; those of several workers are sent to the launcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

from rich import get_console
from rich.console import Console, JustifyMethod, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

from lora_exp.record.console import console as run_console

EVERY_S = {True: 0.25, False: 15.0}  # on a terminal, and in a log
BORDERS = 8  # lines of a table that are no rows
FIXED = 61  # characters of its columns but name, status and progress bar
ROOMY, BARS_FROM = 100, 130  # characters of a screen: for long statuses, and for progress bars
OPEN = ("waits", "trains", "ends")  # statuses of jobs that have not ended
LOST = "its worker died"  # status of a job that is tried again


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

    def end(self, status: str, reason: str = "") -> None:
        """Set the job's final status.

        Args:
            status: as in run.json.
            reason: why it ended early, if it did; no more of its steps are expected then.
        """
        self.status = f"{status}: {reason}" if reason else status
        if reason:
            self.steps = self.step

    @property
    def has_ended(self) -> bool:
        """Return whether the job has its final status."""
        return self.status not in OPEN


@contextmanager
def only_to_logs() -> Iterator[None]:
    """Let what the jobs print go to their run.log alone."""
    consoles = run_console, get_console()  # the latter is used by rich's progress bars
    for console in consoles:
        console.quiet = True
    try:
        yield
    finally:
        for console in consoles:
            console.quiet = False


class Feed:
    """A worker's rows, sent to the launcher's table; used like `Table`."""

    def __init__(
        self, rows: list[Row], trained_tokens: list[int], send: Callable[..., None]
    ) -> None:
        """Create it.

        Args:
            rows: one for each job.
            trained_tokens: as of `Table`.
            send: sends an event to the launcher.
        """
        self.rows, self.trained_tokens, self._send = rows, trained_tokens, send
        self._sent: dict[int, Row] = {}
        self._at = 0.0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Print nothing here."""
        with only_to_logs():
            yield

    def tick(self) -> None:
        """Send the rows that have changed, if it is time."""
        if time.perf_counter() - self._at >= EVERY_S[True]:
            self._send_changed()

    def ended(self, row: Row, status: str, reason: str = "") -> None:
        """Set a job's final status, as `Row.end`, and send it."""
        row.end(status, reason)
        self._send_changed()

    def _send_changed(self) -> None:
        changed = [replace(row) for row in self.rows if self._sent.get(row.number) != row]
        self._sent |= {row.number: row for row in changed}
        self._at = time.perf_counter()
        if changed:
            self._send("shown", changed, self.trained_tokens[0])


class FedRow:
    """A job's row while it trains by itself; implements `Board`."""

    def __init__(self, row: Row, feed: Feed) -> None:
        self.row, self.feed = row, feed

    def begin(self, step: int, steps: int) -> None:
        """Training begins, or resumes."""
        self.row.begin(step, steps)
        self.feed.tick()

    def move(self, step: int) -> None:
        """A step has ended."""
        self.row.move(step)
        self.feed.tick()

    def write(self, line: str, shown: dict[str, str]) -> None:
        """There are new metrics."""
        self.row.write(line, shown)

    def close(self) -> None:
        """Training has ended or failed."""
        self.row.close()
        self.feed.tick()


class Table:
    """The rows of jobs: redrawn on a terminal, summarised in a line every 15 s in a log."""

    def __init__(self, title: str, rows: list[Row], trained_tokens: list[int] | None) -> None:
        """Create the table.

        Args:
            title: above the rows.
            rows: one for each job.
            trained_tokens: a list of the tokens trained so far: one number, or one of each work
                that is dealt out; None: not known of all jobs.
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
        with only_to_logs():
            if self.console.is_terminal:
                self.live.start()
            try:
                yield
            finally:
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
        """Set a job's final status, as `Row.end`; print it if there is no terminal."""
        row.end(status, reason)
        self._print(row)

    def take(self, rows: Iterable[Row], work: int, trained_tokens: int) -> None:
        """Take the rows that a worker has sent.

        Args:
            rows: those that have changed.
            work: of which work they are, by its place in `trained_tokens`.
            trained_tokens: in this work so far.
        """
        if self.trained_tokens is not None:
            self.trained_tokens[work] = trained_tokens
        places = {row.number: i for i, row in enumerate(self.rows)}
        for row in rows:
            before = self.rows[places[row.number]]
            self.rows[places[row.number]] = row
            if row.has_ended and not before.has_ended:
                self._print(row)
        self.tick()

    def _print(self, row: Row) -> None:
        if not self.console.is_terminal:
            loss = f"  loss {row.shown['loss']}" if "loss" in row.shown else ""
            at = "" if ": " in row.status else f" at step {row.step}"
            line = f"job {row.number} ({row.name}): {row.status}{at}{loss}"
            self.console.print(Text(line))

    def _visible(self) -> list[Row]:
        """Return the rows for which the screen has room: those that train, wait, then the ended."""
        room = max(1, self.console.height - BORDERS)
        first = sorted(self.rows, key=lambda row: (row.has_ended, row.status == "waits"))[:room]
        numbers = {row.number for row in first}
        return [row for row in self.rows if row.number in numbers]

    def _rendered(self) -> RenderableType:
        visible, caption = self._visible(), self._summary()
        if hidden := len(self.rows) - len(visible):
            caption = f"and {hidden} more; {caption}"
        width = self.console.width
        has_bars, status = width >= BARS_FROM, 9 if width < ROOMY else 20
        name = max(10, width - FIXED - status - 19 * has_bars)
        table = RichTable(title=self.title, title_justify="left", caption=caption)
        for column in ("job", "name", "step", "loss", "rate", "evaluation", "status"):
            justify: JustifyMethod = "right" if column in ("step", "loss") else "left"
            table.add_column(column, justify=justify, no_wrap=True)
        if has_bars:
            table.add_column("")
        for row in visible:
            bar = ProgressBar(total=row.steps or 1, completed=row.step, width=16)
            table.add_row(
                str(row.number),
                _shortened(row.name, name),
                f"{row.step}/{row.steps}" if row.steps else "",
                row.shown.get("loss", ""),
                row.shown.get("rate", ""),
                row.shown.get("eval", "").strip().removeprefix("eval "),
                _shortened(row.status, status),
                *[bar] * has_bars,
            )
        return table

    def _summary(self) -> str:
        begun = [row for row in self.rows if row.steps]
        ended = sum(row.has_ended and row.status != LOST for row in self.rows)
        text = f"{ended} of {len(self.rows)} jobs done"
        if not begun and ended < len(self.rows):
            return f"{text}, none trains yet: rows are read, and the base is measured"
        total = sum(row.steps for row in begun) + self._expected(begun)
        text += f", step {sum(row.step for row in begun):,} of {total:,}"
        if self.trained_tokens is not None:
            speed = sum(self.trained_tokens) / (time.perf_counter() - self.began)
            text += f", {speed:,.0f} tokens/s together"
        return f"{text}{self._left()}"

    def _expected(self, begun: list[Row]) -> int:
        """Return the steps of jobs that have not begun: each has as many as others."""
        waiting = sum(row.status == "waits" and not row.steps for row in self.rows)
        return waiting * sum(row.steps for row in begun) // max(len(begun), 1)

    def _left(self) -> str:
        """Return the expected time of the remaining steps; a waiting job has as many as others."""
        begun = [row for row in self.rows if row.steps]
        done = sum(row.step - row.first for row in begun)
        left = sum(row.steps - row.step for row in begun if row.status == "trains")
        left += self._expected(begun)
        if not done or not left:
            return ""
        seconds = round((time.perf_counter() - self.began) / done * left)
        return f", {timedelta(seconds=seconds)} left"


def _shortened(text: str, width: int) -> Text:
    shortened = Text(text)
    shortened.truncate(width, overflow="ellipsis")
    return shortened
