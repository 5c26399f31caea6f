"""What `lora-exp reproduce` prints: before the training why bits may differ, after it whether."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from lora_exp.after.likeness import Likeness
from lora_exp.record.console import facts

SHOWN = 8  # differences of a kind


def plan_page(run: Path, record: Mapping[str, Any], reasons: Sequence[str]) -> RenderableType:
    """Return the page before the training.

    Args:
        run: the directory.
        record: its run.json.
        reasons: why bits may differ here and now.
    """
    place = str(record.get("place", "alone"))
    how = place if place == "alone" else f"{place}; alone now, which gives the same bits"
    lines = {"run": str(run), "trained": how}
    if record["status"] == "pruned":
        lines["until"] = f"step {record['stopped']['step']}, where it was stopped"
    if count := len(record.get("resumed") or ()):
        lines["resumed"] = (
            f"{count} time{'s' * (count > 1)}; in one go now, which gives the same bits"
        )
    if threads := record.get("threads"):
        lines["threads"] = f"{threads}, as it had"
    lines["conditions"] = _listed(reasons) or "as then, as far as its record says"
    return facts("trained again", lines)


def result_page(result: Likeness, reasons: Sequence[str], folder: Path | None) -> RenderableType:
    """Return the page after the training.

    Args:
        result: how alike the two are.
        reasons: as on the page before.
        folder: that of the new training, if it is left.
    """
    same = f"the same, {result.files} files byte for byte"
    weights = _listed(result.weights) or (same if result.files else "none were saved")
    lines = {"weights": weights}
    lines["metrics"] = _listed(result.metrics) or f"the same, {result.numbers} numbers and answers"
    if result.inputs:
        lines["inputs"] = _listed(result.inputs)
    if folder is not None:
        lines["directory"] = str(folder)
    return Group(facts("compared", lines), Text(_verdict(result, reasons)))


def _verdict(result: Likeness, reasons: Sequence[str]) -> str:
    if result.same:
        return "reproduced: the same bytes"
    causes = [*reasons, *result.inputs]
    why = "for what is listed above" if causes else "and nothing on record says why"
    return f"not reproduced: other bytes, {why}"


def _listed(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return "\n".join([*texts[:SHOWN], *more])
