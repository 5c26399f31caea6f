"""The journal: appended only, read after any kill, refused to another search."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp.errors import ConfigError
from lora_exp.search.journal import JOURNAL, Journal
from lora_exp.search.trial import Trial

ASKED = {"hydra.sweeper.seed": 1, "peft.r": ["4", "8"]}


def written(folder: Path) -> Journal:
    journal = Journal(folder / JOURNAL)
    journal.begin(ASKED, [Trial({"peft.r": "8"}, "complete", 0.5)])
    journal.propose([Trial({"peft.r": "4"}), Trial({"peft.r": "8"}), Trial({"peft.r": "16"})])
    journal.end(0, journal.trials[0].ended("complete", 0.1 + 0.2))
    journal.end(1, journal.trials[1].ended("pruned", 2, 5))
    return journal


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written(tmp_path)
    journal = Journal(tmp_path / JOURNAL)
    assert journal.asked == ASKED
    assert journal.evidence == [Trial({"peft.r": "8"}, "complete", 0.5)]
    assert journal.trials == [
        Trial({"peft.r": "4"}, "complete", 0.1 + 0.2), Trial({"peft.r": "8"}, "pruned", 2.0, 5),
        Trial({"peft.r": "16"}),
    ]  # fmt: skip
    assert journal.waiting == [2]
    journal.begin(ASKED, [])
    journal.end(2, journal.trials[2].ended("failed", None))
    assert Journal(tmp_path / JOURNAL).trials[2] == Trial({"peft.r": "16"}, "failed")


def test_after_a_kill_at_any_byte_whole_lines_count_and_nothing_else(tmp_path: Path) -> None:
    written(tmp_path)
    whole = (tmp_path / JOURNAL).read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole)):
        (tmp_path / JOURNAL).write_bytes(whole[:size])
        journal = Journal(tmp_path / JOURNAL)
        kept = [line for n, line in enumerate(lines) if len(b"".join(lines[: n + 1])) <= size]
        assert (tmp_path / JOURNAL).read_bytes() == b"".join(kept)
        assert len(journal.waiting) == [0, 0, 3, 2, 1][len(kept)]


def test_another_search_is_refused_with_what_differs(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ConfigError) as refused:
        Journal(tmp_path / JOURNAL).begin({"hydra.sweeper.seed": 2, "peft.r": ["4", "8"]}, [])
    assert "holds another search (hydra.sweeper.seed: 2, was 1); take another" in str(refused.value)


@pytest.mark.parametrize("line", ['{"trial": 9, "state": "complete"}', "[]", "{", '{"trial": "a"}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = written(tmp_path).path
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=rf"{JOURNAL}, line 5 cannot be read"):
        Journal(path)


def test_values_of_several_objectives_are_read_back_in_their_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / JOURNAL)
    others = {"parameters": 7, "bytes": 9}
    journal.begin(ASKED, [Trial({"peft.r": "8"}).ended("complete", 0.5, 0, others)])
    journal.propose([Trial({"peft.r": "4"}), Trial({"peft.r": "16"})])
    journal.end(0, journal.trials[0].ended("complete", 0.25, 0, others))
    journal.end(1, journal.trials[1].ended("pruned", 0.75, 3, {"bytes": 1}))
    read = Journal(tmp_path / JOURNAL)
    assert [t.objectives for t in read.evidence + read.trials] == [
        [0.5, 7.0, 9.0], [0.25, 7.0, 9.0], [0.75, 1.0],
    ]  # fmt: skip
    assert read.trials == journal.trials


def test_a_journal_of_one_objective_is_written_as_ever(tmp_path: Path) -> None:
    assert (written(tmp_path).path).read_text().splitlines() == [
        '{"search": {"hydra.sweeper.seed": 1, "peft.r": ["4", "8"]}, "evidence": [{"values":'
        ' {"peft.r": "8"}, "state": "complete", "value": 0.5, "step": 0}]}',
        '{"batch": [{"peft.r": "4"}, {"peft.r": "8"}, {"peft.r": "16"}]}',
        '{"trial": 0, "state": "complete", "value": 0.30000000000000004}',
        '{"trial": 1, "state": "pruned", "value": 2.0, "step": 5}',
    ]
