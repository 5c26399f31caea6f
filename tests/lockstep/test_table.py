"""A pack on one screen."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lora_exp.lockstep.table import FedRow, Feed, Row, Table
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
    assert "0 of 2 jobs done, step 5 of 20" in text  # the other has as many
    assert "tokens/s together" in text


def test_before_the_first_job_trains_it_says_what_is_done() -> None:
    table, _ = table_and_output(terminal=True)
    assert table._summary().startswith("0 of 2 jobs done, none trains yet: rows are read")
    for row in table.rows:
        row.end("failed")
    assert table._summary().startswith("2 of 2 jobs done, step 0 of 0")


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


def test_rows_of_several_workers_are_in_one_table() -> None:
    """A worker sends what has changed; the launcher's table has all rows and all tokens."""
    sent: list[tuple[str, list[Row], int]] = []
    rows, tokens = [Row(0, "a"), Row(2, "c")], [0]
    feed = Feed(rows, tokens, lambda *event: sent.append(event))
    rows[0].begin(0, 10)
    with feed.open():
        feed.tick()
        rows[0].move(4)
        feed.tick()  # too early
        tokens[0] = 500
        feed.ended(rows[0], "pruned", "halving")
    assert [(kind, [row.number for row in part], n) for kind, part, n in sent] == [
        ("shown", [0, 2], 0), ("shown", [0], 500),
    ]  # fmt: skip
    assert (sent[0][1][0].step, sent[1][1][0].step) == (0, 4)  # copies
    table = Table("in 2 workers", [Row(n, name) for n, name in enumerate("abc")], [0, 0])
    output = io.StringIO()
    table.console = Console(file=output, width=100)
    for _, part, count in sent:
        table.take(part, 1, count)
    table.take([Row(1, "b", "trains", 0, 5, 10)], 0, 250)
    assert output.getvalue().split("\n") == ["job 0 (a): pruned: halving", ""]
    table.began -= 10
    assert table._summary().startswith("1 of 3 jobs done, step 9 of 21, 75 tokens/s together")
    table.trained_tokens = None
    assert table._summary().startswith("1 of 3 jobs done, step 9 of 21, 0:00:")


def test_a_job_that_trains_by_itself_sends_its_row() -> None:
    sent: list[list[Row]] = []
    row = Row(3, "d")
    feed = Feed([row], [0], lambda _, rows, __: sent.append(rows))
    board = FedRow(row, feed)
    board.begin(0, 2)
    feed._at = 0.0
    board.move(1)
    board.write("line", {"loss": "1.5"})
    feed._at = 0.0
    board.close()
    assert [(r.status, r.step, r.shown) for (r,) in sent] == [
        ("trains", 0, {}), ("trains", 1, {}), ("ends", 1, {"loss": "1.5"}),
    ]  # fmt: skip


def test_a_table_is_no_higher_than_the_screen() -> None:
    """Jobs that train are shown first, then those that wait; the summary is always there."""
    rows = [Row(n, "peft.r=8 " * 9, "finished", 0, 5, 5) for n in range(40)]
    rows[3].status, rows[39].status = "trains", "waits"
    table = Table("in lockstep", rows, [0])
    output = io.StringIO()
    for width in (80, 100, 140):
        output.truncate(output.seek(0))
        table.console = Console(file=output, width=width, height=20, force_terminal=True)
        table.console.print(table._rendered())
        text = output.getvalue()
        assert len(text.splitlines()) <= 20, text
        assert all(word in text for word in ("trains", "waits", "peft.r=8", "finished", "5/5"))
        assert "and 28 more; 38 of 40 jobs done" in text
        assert ("━" * 16 in text.partition("5/5")[2]) == (width == 140)
