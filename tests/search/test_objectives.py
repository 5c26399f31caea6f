"""Several objectives: those that repeat and are measured, and a trial's values of them."""

from __future__ import annotations

from typing import Any

import pytest

from lora_exp.errors import ConfigError
from lora_exp.search.limits import Size
from lora_exp.search.objectives import (
    check_measured,
    objective_faults,
    of_all_tasks,
    other_values,
)

LOSS = {"eval/loss": "minimize"}


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (LOSS, "are two or more; a single one is that of the config: objective=... goal=..."),
        (
            {"parameters": "minimize", **LOSS},
            "begin with parameters (minimize), but jobs are judged by eval/loss (minimize)",
        ),
        (
            {"eval/loss": "maximize", "parameters": "minimize"},
            "begin with eval/loss (maximize), but jobs are judged by eval/loss (minimize)",
        ),
        (LOSS | {"bytes": "minimise"}, "bytes: 'minimise' is none of minimize, maximize (did you"),
        (LOSS | {"eval/exact_match": "minimize"}, "would look for the worst; give maximize"),
        (LOSS | {"seconds": "minimize"}, "seconds differs from run to run"),
        (LOSS | {"train/tokens_per_s": "maximize"}, "train/tokens_per_s differs from run to run"),
        (LOSS | {"peak_bytes": "minimize"}, "peak_bytes differs from run to run, so the search"),
        (LOSS | {"train/entropy": "minimize"}, "train/entropy has a last value that depends on"),
    ],
)
def test_objectives_that_cannot_be_compared_are_refused(
    objectives: dict[str, str], message: str
) -> None:
    texts = [text for _, text in objective_faults(objectives, "eval/loss", "minimize")]
    assert message in "\n".join(texts)
    assert len(texts) == 1


def test_sizes_and_metrics_of_held_out_rows_are_objectives() -> None:
    objectives = LOSS | {"parameters": "minimize", "bytes": "minimize", "eval/margin": "maximize"}
    assert not list(objective_faults(objectives, "eval/loss", "minimize"))


def test_what_jobs_do_not_measure_is_refused_with_what_they_do() -> None:
    measured = ["eval/loss", "eval/exact_match", "train/loss", "seconds"]
    check_measured(["eval/loss", "bytes", "parameters"], measured)
    with pytest.raises(ConfigError) as refused:
        check_measured(["eval/los"], measured)
    expected = "eval/los is not measured (did you mean eval/loss?): eval/loss, eval/exact_match, p"
    assert expected in str(refused.value)
    assert of_all_tasks("eval/exact_match_sum") == "eval/exact_match"
    assert of_all_tasks("eval/loss_x") == "eval/loss_x"


def test_values_come_from_the_record_and_from_the_estimate() -> None:
    record: dict[str, Any] = {
        "metrics": {"eval/loss": 1.0, "eval/margin": 2.0},
        "counts": {"trainable_parameters": 7, "parameters": 99},
    }
    names = ["eval/loss", "bytes", "parameters", "eval/margin", "eval/kl"]
    values = other_values(names, record, lambda: Size(5, 10))
    expected = {"bytes": 10, "parameters": 7, "eval/margin": 2.0, "eval/kl": None}
    assert list(values.items()) == list(expected.items())

    def never() -> Size:
        raise AssertionError

    assert other_values(["eval/loss", "parameters"], {}, never) == {"parameters": None}
    assert other_values([], record, never) == {}
