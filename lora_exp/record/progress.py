"""Shown in the terminal: the first row's tokens, and the progress of training."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from typing import Any, Protocol

import datasets
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from lora_exp.data.encoding import IGNORED
from lora_exp.record.clock import Clock
from lora_exp.record.console import console
from lora_exp.record.metrics import grouped_metrics

log = logging.getLogger("lora_exp")
SHOWN_TOKENS = 160
ANSWER_TOKENS = 60  # of these, reserved for the first part that counts
CUT = "\N{REPLACEMENT CHARACTER}"
HARMLESS = (
    "`(is_)?gradient_checkpointing` is deprecated",  # trl still takes transformers' older name
    "Position ids are not supported for parameter efficient tuning",  # prompts carry their own
    "Unsupported layer type .*Norm",  # ln_tuning warns of the layers that it is made for
    "(PiSSA|OLoRA) changes the base weights",  # attach.save converts them, as it asks
    "Could not find a config file in pkg://",  # peft looks for it while it converts these two
    "Model has `tie_word_embeddings=True`",  # a merge unties the two
    "Setting `save_embedding_layers` to `True`",  # correct for an adapted embedding
    "Adapter 'default': .* invalid shape",  # AdaLoRA pruned a module to rank 0
)


def quiet() -> None:
    """Silence messages of libraries that users need not act on."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)


def preview(ids: list[int], labels: list[int], tokenizer: Any) -> Text:
    """Return one row's text: what counts towards the loss is bright, the rest dim.

    Without colours (in run.log) the parts that count are in «». Of a long row, the first part that
    counts is always shown; a long text before it is shortened in its middle.
    """
    text, remaining = Text(), SHOWN_TOKENS
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    for start, stop, counts in _parts(labels):
        style, is_longer = "bold green" if counts else "dim", stop - start > remaining
        if stop == first < len(ids) and stop - start > SHOWN_TOKENS - ANSWER_TOKENS:
            edge = (SHOWN_TOKENS - ANSWER_TOKENS) // 2
            text.append(_decoded(ids, start, start + edge, tokenizer), style)
            text.append(f" … {stop - start - 2 * edge} tokens … ", style="dim italic")
            text.append(_decoded(ids, stop - edge, stop, tokenizer), style)
            remaining -= 2 * edge
            continue
        end = start + remaining if is_longer else stop
        part = _decoded(ids, start, end, tokenizer)
        text.append(f"«{part}»" if counts else part, style)
        remaining -= end - start
        if remaining <= 0:
            if end < len(ids):
                text.append(f" … {len(ids) - end} more tokens", style="dim")
            break
    return text


def _parts(labels: list[int]) -> Iterator[tuple[int, int, bool]]:
    """Yield start, stop and whether its tokens count, for each part of a row."""
    start = 0
    for counts, group in groupby(label != IGNORED for label in labels):
        stop = start + sum(1 for _ in group)
        yield start, stop, counts
        start = stop


def _decoded(ids: list[int], start: int, stop: int, tokenizer: Any) -> str:
    """Return the text of some of a row's tokens; a character cut off at the end is left out."""
    before, text = (str(tokenizer.decode(ids[:end])).rstrip(CUT) for end in (start, stop))
    is_prefix = text.startswith(before)
    part = text[len(before) :] if is_prefix else str(tokenizer.decode(ids[start:stop]))
    return part.replace("\n", "↵")


class Board(Protocol):
    """Where a run's progress is shown."""

    def begin(self, step: int, steps: int) -> None:
        """Start, at a step (above 0 on resume) of a total number of steps."""

    def move(self, step: int) -> None:
        """Report that a step is done."""

    def write(self, line: str, shown: dict[str, str]) -> None:
        """Show new metrics (loss, rate, tokens/s, evaluation), and a line with all of them."""

    def close(self) -> None:
        """Report that training has ended or failed."""


class Bar:
    """A progress bar; without a terminal, a line for each log step."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  rate {task.fields[rate]}"),
            TextColumn("{task.fields[eval]}{task.fields[reward]}{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def begin(self, step: int, steps: int) -> None:
        """Open the bar."""
        self.task = self.bar.add_task(
            "train", total=steps, loss="-", rate="-", speed="-", reward="", eval=""
        )
        self.move(step)
        self.bar.start()

    def move(self, step: int) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=step)

    def write(self, line: str, shown: dict[str, str]) -> None:
        """Show the newest numbers."""
        self.bar.update(self.task, **shown)  # type: ignore[arg-type]
        if self.bar.disable:
            console.print(line)

    def close(self) -> None:
        """Close the bar."""
        self.bar.stop()


class Progression(TrainerCallback):  # type: ignore[misc]
    """Callback: pass a trainer's steps and metrics to a board, and its log steps to run.log."""

    def __init__(self, board: Board, clock: Clock, evaluated: Sequence[str]) -> None:
        """Create the callback.

        Args:
            board: where the numbers are shown.
            clock: that of the training.
            evaluated: names of the evaluation's metrics to show.
        """
        self.board, self.clock, self.evaluated = board, clock, evaluated
        self.shown: dict[str, str] = {}
        self.trains = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the board."""
        self.began, self.first, self.trains = time.perf_counter(), state.global_step, True
        self.board.begin(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step."""
        self.board.move(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Show the newest numbers, those of an evaluation during training too."""
        metrics = grouped_metrics(logs)
        if "train/loss" in metrics:
            words = self._trained(metrics)
        elif self.trains and any(name.startswith("eval/") for name in metrics):
            words = self._measured(metrics)
        else:
            return
        epoch = f"  epoch {state.epoch:.2f}" if state.epoch is not None else ""
        line = f"step {state.global_step}/{state.max_steps}{epoch}  {words}{self._left(state)}"
        log.info("%s", line)
        self.board.write(line, self.shown)

    def _trained(self, metrics: dict[str, float]) -> str:
        tokens, reward = self.clock.tokens, metrics.get("train/reward")
        self.shown = self.shown | {
            "loss": f"{metrics['train/loss']:.4f}",
            "rate": f"{metrics.get('train/learning_rate', 0):.2e}",
            "speed": f"{tokens / self.clock.seconds:,.0f}" if tokens else "-",
            "reward": "" if reward is None else f"reward {reward:.3f}  ",
        }
        line = "loss {loss}  rate {rate}  {reward}{speed} tokens/s"
        return line.format(**self.shown)

    def _measured(self, metrics: dict[str, float]) -> str:
        names = [name for name in self.evaluated if f"eval/{name}" in metrics]
        words = [f"{name.replace('_', ' ')} {metrics[f'eval/{name}']:.4f}" for name in names]
        self.shown = self.shown | {"eval": f"eval {words[0]}  " if words else ""}
        return f"eval {', '.join(words)}"

    def _left(self, state: Any) -> str:
        """Return the expected time of the remaining steps, evaluations included."""
        done, left = state.global_step - self.first, state.max_steps - state.global_step
        if done <= 0 or left <= 0:
            return ""
        seconds = round((time.perf_counter() - self.began) / done * left)
        return f"  {timedelta(seconds=seconds)} left"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the board."""
        self.trains = False
        self.board.close()
