"""A workspace of W&B, by what wandb-workspaces would send; no server is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_exp import compare
from lora_exp.comparison.workspace import places, save_workspaces, workspace
from lora_exp.errors import SavedError
from tests.comparison.conftest import Write

pytest.importorskip("wandb_workspaces", reason="the extra wandb is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # in wandb-workspaces

TRACKED = {"tracking._target_": "lora_exp.tracking.wandb.Wandb", "tracking.project": "ranks"}


@pytest.fixture
def sweep(write_run: Write, tmp_path: Path) -> Path:
    history = [{"step": 5, "train/loss": 2.0}, {"step": 10, "eval/loss": 0.5, "eval/entropy": 1.0}]
    for rank, quant in ((4, "none"), (8, "nf4")):
        write_run(
            f"sweep/{rank}", 1 / rank, overrides={"peft.r": rank, "choices.quant": quant},
            settings=TRACKED | ({"quant": {"quant_type": quant}} if quant == "nf4" else {}),
            history=history, tracking_id=f"id{rank}",
        )  # fmt: skip
    return tmp_path / "sweep"


def test_a_workspace_shows_the_runs_with_what_was_varied_and_their_curves(sweep: Path) -> None:
    comparison = compare(sweep)
    runs = places(comparison.runs)[None, "ranks"]
    made = workspace(comparison, "a sweep", runs, "team", "ranks")
    sent: dict[str, Any] = json.loads(made._to_model().model_dump_json(by_alias=True))
    assert (sent["entity"], sent["project"], sent["displayName"]) == ("team", "ranks", "a sweep")
    text = json.dumps(sent)
    assert all(f'"id{rank}"' in text for rank in (4, 8))
    choice, curves = sent["spec"]["section"]["panelBankConfig"]["sections"][:2]
    assert [panel["viewType"] for panel in choice["panels"]] == [
        "Parallel Coordinates Plot", "Parameter Importance", "Scatter Plot", "Run Comparer",
    ]  # fmt: skip
    columns = [column["accessor"] for column in choice["panels"][0]["config"]["columns"]]
    assert columns == ["config:choices.value.quant", "config:peft.value.r", "summary:objective"]
    metrics = [panel["config"]["metrics"] for panel in curves["panels"]]
    assert metrics == [["eval/loss"], ["train/loss"], ["eval/entropy"]]


def test_what_cannot_be_saved_is_one_error(
    sweep: Path, write_run: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", refuse)
    monkeypatch.setenv("WANDB_ENTITY", "team")
    with pytest.raises(SavedError, match="not saved a workspace of ranks: no network"):
        save_workspaces(compare(sweep), "a")
    with pytest.raises(SavedError, match="none of these runs was tracked by W&B"):
        save_workspaces(compare(write_run("other")), "a")
    monkeypatch.setattr("lora_exp.comparison.workspace.find_spec", lambda _: None)
    with pytest.raises(SavedError, match=r"pip install 'lora-exp\[wandb\]'"):
        save_workspaces(compare(sweep), "a")
