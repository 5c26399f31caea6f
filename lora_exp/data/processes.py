"""Work on parts of a data set in several processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from lora_exp.child import end_with_parent
from lora_exp.errors import DataError

T = TypeVar("T")
THREADS = "TOKENIZERS_PARALLELISM"  # a fork has none of the threads that tokenizers started
_work: tuple[Callable[[Any], Any], Sequence[Any]]  # of a process: the function, and all parts


def in_processes(function: Callable[[Any], T], parts: Sequence[Any], count: int) -> Iterator[T]:
    """Yield what a function returns for each part, in their order.

    Args:
        function: its result is sent between processes; it and the parts are not.
        parts: of the work.
        count: of processes; with 1 this one does it.

    Raises:
        DataError: a process was killed.
    """
    count = min(count, len(parts))
    if count <= 1:
        yield from map(function, parts)
        return
    work = function, parts, os.getpid()
    with _without_threads(), ProcessPoolExecutor(count, get_context("fork"), _begin, work) as pool:
        try:
            yield from pool.map(_do, range(len(parts)))
        except BrokenProcessPool as error:
            text = "a process that tokenises was killed, perhaps for want of memory"
            raise DataError(f"{text}; lower data.num_proc") from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _without_threads() -> Iterator[None]:
    before = os.environ.get(THREADS)
    os.environ[THREADS] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[THREADS]
        else:
            os.environ[THREADS] = before


def _begin(function: Callable[[Any], Any], parts: Sequence[Any], parent: int) -> None:
    global _work
    _work = function, parts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run itself decides what to do
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(parent)


def _do(number: int) -> Any:
    function, parts = _work
    return function(parts[number])
