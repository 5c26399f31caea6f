"""The generated tasks are correct, and the shipped demo rows are reproducible."""

from __future__ import annotations

import json
import random

import pytest

from lora_exp.data import tasks
from lora_exp.files.paths import PACKAGE


@pytest.mark.parametrize("seed", range(20))
def test_generated_answers_are_correct(seed: int) -> None:
    rng = random.Random(seed)
    question, answer = tasks.add(rng)
    numbers = [int(n) for n in question.replace("?", "").replace(".", "").split() if n.isdigit()]
    assert sum(numbers) == int(answer)
    question, answer = tasks.reverse(rng)
    assert question.removeprefix("Reverse: ")[::-1] == answer
    question, answer = tasks.sort(rng)
    assert sorted(question.removeprefix("Sort: ").split()) == answer.split()
    question, answer = tasks.count(rng)
    letter, text = question.removeprefix("Count ").split(": ")
    assert text.split().count(letter) == int(answer)
    question, answer = tasks.mirror(rng)
    letters = question.removeprefix("Mirror: ").split()
    assert answer.split() == letters + letters[::-1]


@pytest.mark.parametrize(
    ("name", "rows", "held_out"), [("train", 1000, False), ("eval", 100, True)]
)
def test_the_shipped_demo_rows_are_generated_with_seed_0(
    name: str, rows: int, held_out: bool
) -> None:
    path = PACKAGE / "assets" / f"demo_{name}.jsonl"
    shipped = [json.loads(line) for line in path.read_text().splitlines()]
    assert shipped == tasks.take(tasks.DEMO, 0, rows, held_out)


def test_training_rows_contain_no_held_out_question() -> None:
    rows = tasks.take(tasks.DEMO, 3, 2000, held_out=False)
    assert not any(tasks.is_held_out(row["messages"][0]["content"]) for row in rows)
