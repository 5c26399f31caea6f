"""A sampler that needs torch, in a process of its own: that of a search never imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

from lora_exp.errors import LoraExpError

# of a trial's number, the attempt and its guess: values for all keys of the space
Ask = Callable[[int, int, Mapping[str, str]], dict[str, str]]


@contextmanager
def apart(make: Callable[[], Ask]) -> Iterator[Ask]:
    """Ask a sampler that is made, and asked, in a fork; it ends with the context.

    Args:
        make: returns what asks the sampler.

    Raises:
        LoraExpError: the sampler fails, or its process dies.
    """
    fork = get_context("fork")
    pipe, other_end = fork.Pipe()
    process = fork.Process(target=_answer, args=(other_end, pipe, make), daemon=True)
    process.start()
    other_end.close()

    def ask(number: int, attempt: int, guess: Mapping[str, str]) -> dict[str, str]:
        try:
            pipe.send((number, attempt, dict(guess)))
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            raise LoraExpError("the process that proposes trials has died") from error
        if isinstance(answer, str):
            raise LoraExpError(f"no trial can be proposed: {answer}")
        values: dict[str, str] = answer
        return values

    try:
        yield ask
    finally:
        pipe.close()
        process.kill()
        process.join()


def _answer(pipe: Connection, other_end: Connection, make: Callable[[], Ask]) -> None:
    """Answer questions with values, or with an error's text, until the pipe is closed."""
    other_end.close()  # else the pipe would stay open after the search has ended
    ask: Ask | None = None
    try:
        while True:
            question = pipe.recv()
            try:
                if ask is None:
                    import torch

                    torch.set_num_threads(1)  # the same proposals with any number
                    ask = make()
                pipe.send(ask(*question))
            except Exception as error:  # this process has no one else to tell
                pipe.send(f"{type(error).__name__}: {error}")
    except (EOFError, OSError, KeyboardInterrupt):
        return
