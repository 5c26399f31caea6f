"""Chat templates: turns to text, in time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lora_exp.data.formats import Row
from lora_exp.errors import DataError

SECONDS = 3.0  # for one row


def render_chat(
    turns: Iterable[Row], tokenizer: Any, tools: Any = None, answer: bool = False
) -> str:
    """Write turns with the chat template; `answer` opens the assistant's turn.

    Raises:
        DataError: the template does not end.
    """
    with in_time():
        text: str = tokenizer.apply_chat_template(
            list(turns), tools=tools, tokenize=False, add_generation_prompt=answer
        )
    return text


@contextmanager
def in_time() -> Iterator[None]:
    """Stop a template that loops: Jinja's sandbox limits a range, but not loops in loops.

    Raises:
        DataError: it does not end. Only a process's first thread can tell.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_: Any) -> None:
        raise DataError(f"the chat template does not end within {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
