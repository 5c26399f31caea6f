"""All figures of a comparison."""

from __future__ import annotations

import json
from pathlib import Path

from lora_exp.comparison.figures import figures
from lora_exp.comparison.value import compare
from tests.comparison.conftest import Write
from tests.comparison.sweeps import HOSTILE, write_sweep

NAMES = [
    "evaluation", "training", "rungs", "by_key", "importance", "costs", "parallel", "tasks",
    "layers",
]  # fmt: skip


def test_a_sweep_has_all_figures_and_plotly_takes_them(tmp_path: Path) -> None:
    compared = compare(write_sweep(tmp_path / "s", seeds=(1, 2), points=20))
    assert list(compared.figures) == NAMES
    assert compared.figures["evaluation"].layout.title.text == "Evaluation"


def test_figures_hold_no_text_that_plotly_would_read_as_html(tmp_path: Path) -> None:
    compared = compare(write_sweep(tmp_path / "s", ranks=(4,), seeds=(1,), points=8, hostile=True))
    drawn = json.dumps(figures(compared.groups, "eval/loss", "minimize"))
    assert "&lt;script&gt;window.hurt" in drawn
    assert HOSTILE[:20] not in drawn
    assert "<img" not in drawn


def test_a_run_that_logged_nothing_has_no_figures(write_run: Write) -> None:
    assert compare(write_run("a", None, status="failed")).figures == {}


def test_each_objective_has_figures_of_its_own(write_run: Write) -> None:
    for i, objective in enumerate(("eval/loss", "eval/acc", "eval/loss", "eval/acc")):
        history = [{"step": step, objective: step} for step in (1, 2)]
        path = write_run(
            f"s/{i}", 1.0, objective=objective, history=history, metrics={"eval/acc": 0.5},
            overrides={"peft.r": i},
        )  # fmt: skip
    names = list(compare(path.parent).figures)
    assert "evaluation" in names
    assert "evaluation eval/acc" in names
