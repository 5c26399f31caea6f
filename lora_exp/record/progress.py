"""What the terminal shows during training: the first row's tokens, and the progress."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any, Protocol

import datasets
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from lora_exp.data.tokens import IGNORED
from lora_exp.record.console import console
from lora_exp.record.metrics import named

log = logging.getLogger("lora_exp")
SHOWN_TOKENS = 160
HARMLESS = (
    "`(is_)?gradient_checkpointing` is deprecated",  # trl still takes transformers' older name
    "Position ids are not supported for parameter efficient tuning",  # prompts carry their own
    "Unsupported layer type .*Norm",  # ln_tuning says so of the very layers it is made for
    "(PiSSA|OLoRA) changes the base weights",  # attach.save converts them, as it asks
    "Could not find a config file in pkg://",  # peft looks for it while it converts those two
    "Model has `tie_word_embeddings=True`",  # a merge parts the two
    "Setting `save_embedding_layers` to `True`",  # that of an adapted embedding, as it should
    "Adapter 'default': .* invalid shape",  # AdaLoRA pruned a module to rank 0
)


def quiet() -> None:
    """Silence messages of the libraries below that our users cannot act on."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)


def preview(ids: list[int], labels: list[int], tokenizer: Any) -> Text:
    """Return one row's tokens: those that count towards the loss are bright, the others dim.

    Without colours (in run.log) the parts that count are in «».
    """
    text, counting = Text(), False
    for token, label in list(zip(ids, labels, strict=True))[:SHOWN_TOKENS]:
        if (label != IGNORED) != counting:
            counting = not counting
            text.append("«" if counting else "»", style="bold green")
        piece = tokenizer.decode([token]).replace("\n", "↵")
        text.append(piece, style="bold green" if counting else "dim")
    text.append("»" if counting else "", style="bold green")
    if len(ids) > SHOWN_TOKENS:
        text.append(f" … {len(ids) - SHOWN_TOKENS} more tokens", style="dim")
    return text


class Board(Protocol):
    """Where a run's progress is shown."""

    def begin(self, step: int, steps: int) -> None:
        """Start, at a step (above 0 on resume) of a total number of steps."""

    def move(self, step: int) -> None:
        """Report that a step is done."""

    def write(self, line: str, shown: dict[str, str]) -> None:
        """Report new metrics: loss, learning rate and tokens/s, and a line with all of them."""

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
            TextColumn("{task.fields[reward]}{task.fields[speed]} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def begin(self, step: int, steps: int) -> None:
        """Open the bar."""
        self.task = self.bar.add_task(
            "train", total=steps, loss="-", rate="-", speed="-", reward=""
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

    def __init__(self, board: Board) -> None:
        self.board = board

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the board."""
        self.started = time.perf_counter()
        self.board.begin(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step."""
        self.board.move(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Show the newest numbers."""
        metrics = named(logs)
        if "train/loss" not in metrics:
            return
        tokens = metrics.get("train/num_tokens", 0.0)
        elapsed = time.perf_counter() - self.started
        shown = {
            "loss": f"{metrics['train/loss']:.4f}",
            "rate": f"{metrics.get('train/learning_rate', 0):.2e}",
            "speed": f"{tokens / elapsed:,.0f}" if tokens else "-",
            "reward": f"reward {metrics['train/reward']:.3f}  "
            if "train/reward" in metrics
            else "",
        }
        line = f"step {state.global_step}/{state.max_steps}  loss {shown['loss']}"
        line += f"  rate {shown['rate']}  {shown['reward']}{shown['speed']} tokens/s"
        log.info("%s", line)
        self.board.write(line, shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the board."""
        self.board.close()
