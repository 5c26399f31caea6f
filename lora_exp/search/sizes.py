"""The sizes of cells, computed by a process of its own: that of a search never imports torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from omegaconf import DictConfig

from lora_exp.errors import LoraExpError
from lora_exp.search.limits import Size

# keys that change neither parameters nor memory: cells that differ only in them are one question
SAME_SIZE = re.compile(
    r"(seed|rate(\..*)?|peft\.lora_(alpha|dropout)|train\.(learning_rate|lr_scheduler_\w+"
    r"|weight_decay|warmup_\w+|max_steps|num_train_epochs|max_grad_norm|adam_\w+|seed))$"
)
Settle = Callable[[Mapping[str, str]], DictConfig]


class Sizes:
    """Answers what the job of a cell needs, and remembers it; `close` ends the process."""

    def __init__(self, settle: Settle) -> None:
        """Store how to settle a config; the process begins with the first question.

        Args:
            settle: returns the settled config of a cell's values.
        """
        self._settle = settle
        self._known: dict[frozenset[tuple[str, str]], Size | None] = {}
        self._pipe: Connection | None = None

    def __call__(self, values: Mapping[str, str]) -> Size | None:
        """Return what a cell needs; None: its job will be refused.

        Raises:
            LoraExpError: it cannot be estimated.
        """
        sized = {key: text for key, text in values.items() if not SAME_SIZE.match(key.lstrip("+"))}
        cell = frozenset(sized.items())
        if cell not in self._known:
            try:
                config = self._settle(sized)
            except LoraExpError:
                self._known[cell] = None
            else:
                self._known[cell] = self._asked(config, values)
        return self._known[cell]

    def _asked(self, config: DictConfig, values: Mapping[str, str]) -> Size | None:
        if self._pipe is None:
            fork = get_context("fork")
            self._pipe, other_end = fork.Pipe()
            arguments = (other_end, self._pipe)
            self._process = fork.Process(target=_answer, args=arguments, daemon=True)
            self._process.start()
            other_end.close()
        try:
            self._pipe.send(config)
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise LoraExpError("the process that estimates sizes has died") from error
        if isinstance(answer, str):
            cell = " ".join(f"{key}={text}" for key, text in values.items())
            raise LoraExpError(f"the size of {cell} cannot be estimated: {answer}")
        return None if answer is None else Size(*answer)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
            self._process.kill()
            self._process.join()


def _answer(pipe: Connection, other_end: Connection) -> None:
    """Answer configs with their sizes until the pipe is closed.

    An answer is a pair of numbers, None for a config that a run refuses, too, or an error's text.
    """
    other_end.close()  # else the pipe would stay open after the search has ended
    try:
        while True:
            pipe.send(_estimated(pipe.recv()))
    except (EOFError, OSError, KeyboardInterrupt):
        return  # the search has ended


def _estimated(config: DictConfig) -> Any:
    from lora_exp.after.estimate import as_saved, model_config, need
    from lora_exp.record.progress import quiet

    quiet()
    try:
        of_model = model_config(config)
        needed = need(as_saved(config, of_model), of_model)
    except LoraExpError:
        return None
    except Exception as error:  # this process has no one else to tell
        return f"{type(error).__name__}: {error}"
    return needed.trainable, needed.total
