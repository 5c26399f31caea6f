"""A pack on one screen."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lora_exp.lockstep.table import Row, Table
from lora_exp.record.console import console


def table_and_output(terminal: bool) -> tuple[Table, io.StringIO]:
    table = Table("in lockstep", [Row(0, "peft.r=8"), Row(1, "peft.r=16")], [12_000])
    output = io.StringIO()
    table.console = Console(file=output, force_terminal=terminal, width=100)
    return table, output


def test_a_row_for_each_job_with_step_loss_and_rate() -> None:
    table, output = table_and_output(terminal=True)
    row = table.rows[0]
    row.begin(2, 10)
    row.move(5)
    row.write("", {"loss": "1.2345", "rate": "2.00e-04", "speed": "-", "eval": "eval loss 2.5  "})
    table.console.print(table._rendered())
    text = output.getvalue()
    parts = ("peft.r=8", "5/10", "1.2345", "2.00e-04", "loss 2.5", "trains", "peft.r=16", "waits")
    for part in parts:
        assert part in text
    assert "0 of 2 jobs done, step 5 of 10" in text
    assert "tokens/s together" in text


def test_the_time_left_counts_steps_done_here_and_jobs_that_wait() -> None:
    table, _ = table_and_output(terminal=False)
    assert "left" not in table._summary()
    table.rows[0].begin(2, 10)
    table.rows[0].move(6)
    table.began -= 8  # 2 s a step: 4 of the first job are left, and 10 of the one that waits
    assert table._summary().endswith("tokens/s together, 0:00:28 left")
    table.ended(table.rows[0], "failed")
    assert table._summary().endswith(", 0:00:20 left")


def test_a_log_gets_a_line_for_each_job_that_ends() -> None:
    table, output = table_and_output(terminal=False)
    table.rows[1].begin(0, 3)
    table.rows[1].move(3)
    table.ended(table.rows[1], "failed")
    assert "job 1 (peft.r=16): failed at step 3" in output.getvalue()


def test_while_the_table_is_open_jobs_print_to_their_logs_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table, _ = table_and_output(terminal=False)
    with table.open():
        console.print("a job's own words")
    console.print("afterwards")
    assert capsys.readouterr().out.split() == ["afterwards"]
