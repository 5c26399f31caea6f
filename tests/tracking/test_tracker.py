"""A tracker of one's own gets what is known of the run, and then its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_exp import compose, run
from lora_exp.tracking.tracker import RunInfo, Tracker
from tests.conftest import QUICK

OPTION = """\
# @package tracking.mine
_target_: tests.tracking.test_tracker.Mine
colour: green
"""


class Mine:
    """Keeps what it gets."""

    label, place = "Mine", "memory"
    made: list[Mine] = []  # noqa: RUF012  (pytest imports this module once)

    def __init__(self, colour: str, *, run: RunInfo) -> None:
        self.colour, self.run, self.ended = colour, run, ""
        self.logged: dict[str, float] = {}
        Mine.made.append(self)

    def describe(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged |= metrics

    def samples(self, samples: list[dict[str, Any]], step: int) -> None:
        self.answers = samples

    def finish(self, summary: dict[str, Any], saved: Path | None, ended: str) -> None:
        self.ended = ended


def test_a_tracker_of_ones_own_gets_the_run_and_its_metrics(tmp_path: Path) -> None:
    (tmp_path / "conf/tracking").mkdir(parents=True)
    (tmp_path / "conf/tracking/mine.yaml").write_text(OPTION)
    words = ["tracking=mine", "trusted_targets=[tests.tracking.test_tracker.Mine]", "peft.r=2"]
    words += ["train.max_steps=1", "data.max_rows=16", "data.max_eval_rows=2", "samples.rows=0"]
    quick = [word for word in QUICK if word.partition("=")[0] not in "".join(words)]
    cfg = compose(*quick, *words, config_dir=tmp_path / "conf")
    result = run(cfg, tmp_path / "run", "day/time")
    (mine,) = Mine.made
    tracker: Tracker = mine
    assert (tracker.label, mine.colour, mine.ended) == ("Mine", "green", "finished")
    assert (mine.run.directory, mine.run.sweep) == (result.directory, "day/time")
    assert (mine.run.name, mine.run.algorithm) == (cfg.name, "sft")
    assert "peft=lora" in mine.run.choices
    assert mine.run.config["peft"]["r"] == 2
    assert {"train/loss", "eval/loss", "before/loss"} <= mine.logged.keys()
