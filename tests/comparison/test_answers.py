"""Answers of all runs to the same prompts."""

from __future__ import annotations

import json

import pytest

from lora_exp.comparison import answers as module
from lora_exp.comparison.answers import answers
from lora_exp.comparison.sections import badges
from lora_exp.comparison.value import compare
from tests.comparison.conftest import Write


def test_each_prompt_has_the_answer_of_each_run_and_each_text_once(write_run: Write) -> None:
    write_run("s/1", 0.1, answers=["yes", "no"], overrides={"peft.r": 4})
    write_run("s/2", 0.2, answers=["yes"], overrides={"peft.r": 8})
    path = write_run("s/3", 0.3, answers=["left out"], overrides={"peft.r": 16})
    unanswered = {"prompt": "0?", "expected": "yes", "task": None, "before": "no", "after": None}
    (path / "samples.jsonl").write_text(json.dumps(unanswered) + "\n")
    groups = list(compare(path.parent).groups)
    made = answers(groups, badges(groups, 0))
    assert made is not None
    assert made["texts"] == ["0?", "yes", "1?", "no"]
    assert [row["answers"] for row in made["rows"]] == [[1, 1], [3, -1]]
    labels = [(run["label"], run["number"]) for run in made["runs"]]
    assert labels == [("peft.r=4", 1), ("peft.r=8", 2)]
    assert answers(groups[2:], badges(groups, 0)[2:]) is None


def test_more_prompts_than_a_page_takes_are_counted(
    write_run: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BYTES", 40)
    groups = list(compare(write_run("s/1", answers=[f"answer {i}" for i in range(9)])).groups)
    made = answers(groups, badges(groups, 0))
    assert made is not None
    assert len(made["rows"]) + made["left_out"] == 9
    assert 0 < len(made["rows"]) < 9


def test_the_best_groups_are_shown_by_one_run_each(write_run: Write) -> None:
    for i in range(10):
        overrides = {"peft.r": i // 2 + 1, "seed": i}
        path = write_run(f"s/{i}", i / 10, answers=["a"], overrides=overrides)
    groups = list(compare(path.parent).groups)
    made = answers(groups, badges(groups, 0))
    assert made is not None
    assert [i for i, run in enumerate(made["runs"]) if run["shown"]] == [0, 2, 4]
    assert made["runs"][1]["label"] == "peft.r=1, seed 1"
