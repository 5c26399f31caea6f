"""Keys that differ: what counts, and which of them become columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_exp.comparison.keys import canonical, columns, compared, differing, text_of, value_of
from lora_exp.config.settled import SWITCHES
from lora_exp.runs.run import SavedRun, read_run

Write = Callable[..., Path]


def chosen(write_run: Write, **overrides: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the columns of runs with overrides each."""
    runs = [read_run(write_run(name, overrides=pairs)) for name, pairs in overrides.items()]
    return columns(runs, differing([compared(run) for run in runs]))


def test_names_seeds_and_what_only_reports_do_not_differ(write_run: Write) -> None:
    keys = {
        "name": "x", "seed": 5, "tracking.project": "p", "resume": "r", "train.logging_steps": 3,
        "train.save_steps": 3, "train.eval_steps": 3, "lockstep.max_jobs": 1, "choices.tracking": 1,
        "data.num_proc": 1,
        "early_stopping.rungs": 3,
    }  # fmt: skip
    assert chosen(write_run, a={}, b=keys) == ([], [])
    one, two = ({"parallel.processes": count} for count in (1, 2))
    assert chosen(write_run, none={}, one=one) == ([], [])  # earlier versions did not write it
    assert chosen(write_run, before={}, two=two) == (["parallel.processes"], [])
    assert chosen(write_run, earlier={}, usual=SWITCHES) == ([], [])
    other = {"lockstep.mode": "bmm", "keep": "best", "train.eval_accumulation_steps": 2}
    assert chosen(write_run, c={}, d=other) == (list(other), [])


def test_evaluations_count_where_they_act(write_run: Write) -> None:
    best = {"train.load_best_model_at_end": True}
    one, two = ({**best, "train.eval_steps": steps} for steps in (1, 2))
    assert chosen(write_run, a=one, b=two) == (["train.eval_steps"], [])
    patience = {"early_stopping.patience": 1}
    assert chosen(write_run, c=patience, d={"early_stopping.patience": 2})[0] == [
        "early_stopping.patience"
    ]


def test_an_option_stands_for_the_keys_that_it_sets(write_run: Write) -> None:
    nf4 = {"quant": {"quant_type": "nf4", "double": True}, "choices.quant": "nf4"}
    qv = {"targets": "qv", "choices.targets": "qv", "peft.target_modules": "qv"}
    runs = [read_run(write_run(str(i), settings=s)) for i, s in enumerate(({}, nf4, qv))]
    differ = differing([compared(run) for run in runs])
    assert columns(runs, differ) == (["quant", "targets"], [])
    assert [value_of(run, "quant") for run in runs] == ["none", "nf4", "none"]


def test_a_key_that_follows_from_others_is_told_apart_from_one_that_does_not(
    write_run: Write,
) -> None:
    def run(r: int, dropout: float) -> SavedRun:
        settings = {"extra.alpha": 2 * r, "extra.dropout": dropout}
        return read_run(write_run(f"{r}-{dropout}", overrides={"peft.r": r}, settings=settings))

    runs = [run(4, 0.1), run(8, 0.1), run(8, 0.2)]
    differ = differing([compared(r) for r in runs])
    assert columns(runs, differ) == (["peft.r", "extra.dropout"], ["extra.alpha"])


def test_keys_of_the_command_line_are_columns_though_they_vary_together(write_run: Write) -> None:
    a, b = {"peft.r": 4, "train.max_steps": 5}, {"peft.r": 8, "train.max_steps": 6}
    assert chosen(write_run, a=a, b=b) == (["peft.r", "train.max_steps"], [])


def test_equal_values_are_equal_whatever_their_type(write_run: Write) -> None:
    assert canonical(1.0) == canonical(1)
    assert canonical(True) != canonical(1)
    assert canonical(None) != canonical("null")
    assert canonical(float("nan")) == canonical(float("nan"))
    assert chosen(write_run, a={"train.max_steps": 10.0}, b={}) == ([], [])
    assert chosen(write_run, c={"train.extra": None}, d={}) == (["train.extra"], [])


def test_values_are_written_as_text() -> None:
    values = {"a": ["q", "v"], "b": None, "c": "x", "d": 1e-4, "e": "ü"}
    texts = [text_of(values, key) for key in [*values, "missing"]]
    assert texts == ['["q", "v"]', "null", "x", "0.0001", "ü", ""]
