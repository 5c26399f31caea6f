"""Tables of the report."""

from __future__ import annotations

from typing import Any

from lora_exp.comparison import sections
from lora_exp.comparison.value import compare
from tests.comparison.conftest import Write


def texts(table: Any) -> list[list[str]]:
    return [[str(cell["text"]) for cell in row["cells"]] for row in table["rows"]]


def test_groups_have_their_values_difference_verdict_and_cost(write_run: Write) -> None:
    for seed in (1, 2, 3):
        write_run(f"s/{seed}", 1 + seed / 100, overrides={"peft.r": 4, "seed": seed})
        path = write_run(f"s/8{seed}", 2 + seed / 99, overrides={"peft.r": 8, "seed": seed})
    compared = compare(path.parent)
    groups = compared.of("eval/loss")
    table = sections.group_table(groups, compared.keys, sections.badges(groups, 0))
    names = [column["name"] for column in table["columns"]]
    assert names[:6] == ["group", "peft.r", "eval/loss", "seeds", "difference", "verdict"]
    assert "status" not in names  # all have finished
    best, other = texts(table)
    assert best[:6] == ["1", "4", "1.02", "3", "-", "baseline"]
    assert other[:6] == ["2", "8", "2.02", "3", "+1", "worse"]
    assert table["rows"][0]["cells"][2]["note"] == "± 0.01"
    assert table["rows"][1]["cells"][4]["note"].startswith("[+1, +1")
    assert best[-4:] == ["1,000", "1.00 GiB", "100", "5"]


def test_keys_that_differ_are_listed_and_usual_values_recede(write_run: Write) -> None:
    for rank in (4, 8, 16):
        overrides = {"peft.r": rank, "train.max_steps": min(rank, 8), "tracking": rank}
        path = write_run(f"s/{rank}", rank / 10, overrides=overrides)
    table = sections.differences(compare(path.parent).groups)
    assert sorted(texts(table)) == [["peft.r", "4", "8", "16"], ["train.max_steps", "4", "8", "8"]]
    styles = {row["cells"][0]["text"]: [c["class"] for c in row["cells"]] for row in table["rows"]}
    assert styles["train.max_steps"] == ["", "", "same", "same"]


def test_stopped_runs_are_listed_with_the_share_that_was_trained(write_run: Write) -> None:
    rung = {"rung": 0, "step": 5, "steps": 10, "value": 2.0, "rank": 2, "of": 2}
    stopped = {"rule": "halving", "step": 5, "value": 2.0, "reason": "2 of 2 at step 5"}
    write_run("s/1", 1.0, overrides={"peft.r": 4})
    options = {"status": "pruned", "steps": 5, "stopped": stopped, "rungs": [rung]}
    path = write_run("s/2", 2.0, overrides={"peft.r": 8}, **options)
    groups = compare(path.parent).groups
    table = sections.stops(groups, sections.badges(groups, 0))
    assert texts(table) == [["2", "s-2", "halving", "5", "2", "2 of 2 at step 5"]]
    runs = [run for group in groups for run in group.runs]
    text = "1 of 2 runs were stopped by halving; together all runs trained 75% of the steps"
    assert sections.plan_text(runs).startswith(text)


def test_each_run_has_a_command_for_a_shell_and_its_hashes(write_run: Write) -> None:
    path = write_run("s/1", 1.0, fingerprint="f" * 64)
    overrides = "- +train.x='a b'\n- name=it's\n"
    (path / ".hydra/overrides.yaml").write_text(overrides)
    groups = compare(path).groups
    entry = sections.details(groups, sections.badges(groups, 0))[0]
    assert entry["command"] == """lora-exp run '+train.x='"'"'a b'"'"'' 'name=it'"'"'s'"""
    assert ("fingerprint", "f" * 64) in entry["facts"]
    assert ("rows.jsonl", "abc") in entry["facts"]
    table = sections.run_table(groups, sections.badges(groups, 0))
    assert table["rows"][0]["cells"][-1]["text"] == "f" * 12
    (path / ".hydra/overrides.yaml").unlink()
    assert sections.command(groups[0].runs[0]) == "lora-exp run"
