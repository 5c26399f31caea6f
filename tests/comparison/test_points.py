"""Points of runs."""

from __future__ import annotations

from lora_exp.comparison.points import caption, points
from tests.comparison.series import run, series


def test_a_pruned_run_far_from_the_finished_ones_stands_at_the_edge() -> None:
    runs = run(1.0), run(2.0), run(50.0, status="pruned"), run(1.5, status="pruned")
    found = points([series(*runs)])
    assert [point.shown == point.objective for point in found] == [True, True, False, True]
    assert 2 < found[2].shown < 3
    assert (
        caption("Runs.", found) == "Runs. Hollow: stopped early. At the edge: out of the picture."
    )
    assert caption("Runs.", found[:2]) == "Runs."


def test_runs_without_an_objective_have_no_point() -> None:
    assert points([series(run(None), run(1.0, status="failed"))]) == []
