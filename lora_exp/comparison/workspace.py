"""A saved workspace of W&B for compared runs; nothing of it is on the way of a training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lora_exp.comparison.decision import Compared
from lora_exp.errors import SavedError
from lora_exp.runs.run import SavedRun
from lora_exp.tracking.wandb import PROJECT, STEP

WORKSPACES, REPORTS = "wandb_workspaces.workspaces", "wandb_workspaces.reports.v2"
Place = tuple[str | None, str]  # entity (None: that of the key) and project


def save_workspaces(compared: Compared, title: str) -> list[str]:
    """Save a workspace in each W&B project that the runs were sent to, and return their addresses.

    Args:
        compared: the comparison.
        title: of the workspaces.

    Raises:
        SavedError: wandb-workspaces is not installed, no run was tracked by W&B, or W&B refuses.
    """
    if find_spec("wandb_workspaces") is None:
        raise SavedError("--wandb needs wandb-workspaces: pip install 'lora-exp[wandb]'")
    if not (by_place := places(compared.runs)):
        raise SavedError("--wandb: none of these runs was tracked by W&B (tracking=wandb)")
    addresses = []
    for (entity, project), runs in by_place.items():
        try:
            saved = workspace(compared, title, runs, entity or _own_entity(), project).save()
        except Exception as error:  # a server's, or one of a library that is a preview
            text = str(error) or type(error).__name__
            raise SavedError(f"W&B has not saved a workspace of {project}: {text}") from error
        addresses.append(str(saved.url))
    return addresses


def places(runs: Sequence[SavedRun]) -> dict[Place, list[SavedRun]]:
    """Return the runs that W&B has tracked, by entity and project."""
    by_place: dict[Place, list[SavedRun]] = {}
    for run in runs:
        config = run.config()
        if config.get("tracking._target_") == "lora_exp.tracking.wandb.Wandb":
            entity = config.get("tracking.entity") or os.environ.get("WANDB_ENTITY")
            project = config.get("tracking.project") or os.environ.get("WANDB_PROJECT") or PROJECT
            by_place.setdefault((entity, str(project)), []).append(run)
    return by_place


def workspace(
    compared: Compared, title: str, runs: Sequence[SavedRun], entity: str, project: str
) -> Any:
    """Return a workspace that shows these runs only; it is not saved yet."""
    ws: Any = import_module(WORKSPACES)

    ids = [run.record["tracking_id"] for run in runs]
    sections = [
        ws.Section(name="Choice", panels=_choice(compared), is_open=True),
        ws.Section(name="Curves", panels=_curves(compared), is_open=True),
    ]
    return ws.Workspace(
        entity=entity, project=project, name=title, sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=len(ids)),
        runset_settings=ws.RunsetSettings(filters=ws.And(ws.Metric("ID").isin(ids))),
    )  # fmt: skip


def _choice(compared: Compared) -> list[Any]:
    """Return the panels by which a run is chosen: what was varied, and what it costs."""
    wr: Any = import_module(REPORTS)

    choices = compared.groups[0].runs[0].record.get("choices") or {}
    varied = [wr.Config(f"choices.{key}" if key in choices else key) for key in compared.keys]
    value = wr.SummaryMetric("objective")
    columns = [wr.ParallelCoordinatesPlotColumn(metric=metric) for metric in (*varied, value)]
    return [
        wr.ParallelCoordinatesPlot(title="What was varied", columns=columns),
        wr.ParameterImportancePlot(with_respect_to="objective"),
        wr.ScatterPlot(
            title="Quality and size", x=wr.SummaryMetric("trainable_parameters"), y=value
        ),
        wr.RunComparer(diff_only="split"),
    ]


def _curves(compared: Compared) -> list[Any]:
    wr: Any = import_module(REPORTS)

    logged = {name for group in compared.groups for run in group.runs[:1] for name in _names(run)}
    evaluations = sorted(name for name in logged if name.startswith("eval/"))
    first = [name for name in (*compared.objectives, "train/loss") if name in logged]
    names = dict.fromkeys([*first, *evaluations])
    return [wr.LinePlot(title=name, x=STEP, y=[name]) for name in names]


def _names(run: SavedRun) -> set[str]:
    return {name for line in run.history() if line.get("step") for name in line}


def _own_entity() -> str:
    import wandb

    return str(wandb.Api().default_entity)
