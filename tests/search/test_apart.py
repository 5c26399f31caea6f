"""A sampler in a process of its own: answers, errors, and its end."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from multiprocessing import active_children

import pytest

from lora_exp.errors import LoraExpError
from lora_exp.search.apart import Ask, apart


def counting() -> Ask:
    """Return what answers with its process, and with how often it was asked."""
    asked = []

    def ask(number: int, attempt: int, guess: Mapping[str, str]) -> dict[str, str]:
        if number < 0:
            raise ValueError("no such trial")
        asked.append(number)
        return {"process": str(os.getpid()), "asked": str(len(asked)), **guess}

    return ask


def test_one_process_answers_all_questions_and_ends() -> None:
    with apart(counting) as ask:
        first, second = ask(0, 0, {}), ask(1, 0, {"rate": "1e-3"})
        assert first["process"] == second["process"] != str(os.getpid())
        assert (first["asked"], second["asked"], second["rate"]) == ("1", "2", "1e-3")
    assert not active_children()


def test_its_error_is_ours() -> None:
    with apart(counting) as ask, pytest.raises(LoraExpError, match="proposed: ValueError: no such"):
        ask(-1, 0, {})


def test_its_death_is_an_error() -> None:
    with apart(counting) as ask:
        os.kill(int(ask(0, 0, {})["process"]), signal.SIGKILL)
        with pytest.raises(LoraExpError, match="proposes trials has died"):
            ask(1, 0, {})
