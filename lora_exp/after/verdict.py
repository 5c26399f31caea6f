"""What `lora-exp reproduce` prints: before the training why bits may differ, after it whether."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_exp.after.likeness import Likeness
from lora_exp.after.relaunch import JobLikeness, SweepRecipe
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


def sweep_page(recipe: SweepRecipe) -> RenderableType:
    """Return the page before a sweep is launched again."""
    places = dict.fromkeys(str(record.get("place")) for record in recipe.records.values())
    lines = {"sweep": f"{recipe.sweep}, {len(recipe.records)} jobs", "trained": ", ".join(places)}
    lines["conditions"] = _listed(recipe.reasons) or "as then, as far as its records say"
    return facts("launched again", lines)


def jobs_page(
    results: Sequence[JobLikeness], reasons: Sequence[str], folder: Path | None
) -> RenderableType:
    """Return the page after a sweep was launched again.

    Args:
        results: how alike each job is.
        reasons: as on the page before.
        folder: that of the new sweep, if it is left.
    """
    table = Table("job", "status", "weights", "metrics", title="compared", title_justify="left")
    for result in results:
        table.add_row(result.job, *map(Text, _cells(result)))
    equal = sum(result.same for result in results)
    text = f"reproduced: {equal} of {len(results)} jobs are the same"
    if equal < len(results):
        inputs = [text for r in results if r.likeness for text in r.likeness.inputs]
        text = f"not {text}; the others differ {_why([*reasons, *inputs])}"
    where = [Text(f"directory  {folder}")] if folder is not None else []
    return Group(table, *where, Text(text))


def _cells(result: JobLikeness) -> tuple[str, str, str]:
    """Return status, weights and metrics of a row of `jobs_page`."""
    changed = result.new_status != result.status
    status = f"{result.status}, now {result.new_status}" if changed else result.status
    if not result.has_same_config and result.new_status != "missing":
        status += "; another config"
    if result.likeness is None:
        return status, "", ""
    weights = f"the same, {result.likeness.files} files" if result.likeness.files else "none saved"
    metrics = f"the same, {result.likeness.numbers} numbers"
    differing = result.likeness.weights, result.likeness.metrics
    return status, _listed(differing[0]) or weights, _listed(differing[1]) or metrics


def _verdict(result: Likeness, reasons: Sequence[str]) -> str:
    if result.same:
        return "reproduced: the same bytes"
    return f"not reproduced: other bytes, {_why([*reasons, *result.inputs])}"


def _why(causes: Sequence[str]) -> str:
    return "for what is listed above" if causes else "and nothing on record says why"


def _listed(texts: Sequence[str]) -> str:
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return "\n".join([*texts[:SHOWN], *more])
