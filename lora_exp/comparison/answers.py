"""The answers of all runs to the same prompts, fit to be embedded in a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_exp.comparison.group import Group

BYTES = 1_500_000  # of texts in a page; more prompts are left out
SHOWN = 3  # groups whose first run is shown at first


def answers(groups: Sequence[Group], badges: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return each prompt with the answer of each run, every text once; None: there are none.

    Returns:
        `texts`; `runs` (label, number and colour of its group, shown); `rows` (prompt, expected
        and answers as places in texts, -1: none; task); `left_out`, how many prompts are too many.
    """
    runs, rows = _gathered(groups, badges)
    if not rows:
        return None
    texts: dict[str, int] = {}
    size = 0
    kept: list[dict[str, Any]] = []
    for (prompt, expected, task), row in rows.items():
        new = {text for text in (prompt, expected, *row.values()) if text not in texts}
        size += sum(map(len, map(ascii, new))) + 4 * len(runs)
        if size > BYTES and kept:
            break
        for text in (prompt, expected, *row.values()):
            texts.setdefault(text, len(texts))
        places = [texts[row[i]] if i in row else -1 for i in range(len(runs))]
        kept.append({
            "prompt": texts[prompt], "expected": texts[expected], "task": task, "answers": places,
        })  # fmt: skip
    return {
        "texts": list(texts), "runs": runs, "rows": kept, "left_out": len(rows) - len(kept),
    }  # fmt: skip


def _gathered(
    groups: Sequence[Group], badges: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[tuple[str, str, str], dict[int, str]]]:
    """Return the runs that have answers, and by prompt the answer of each."""
    runs: list[dict[str, Any]] = []
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    for group, badge in zip(groups, badges, strict=True):
        is_first = True
        for run in group.runs:
            answered = [sample for sample in run.samples() if sample.get("after") is not None]
            for sample in answered:
                prompt, expected, task = (
                    str(sample.get(key) or "") for key in ("prompt", "expected", "task")
                )
                rows.setdefault((prompt, expected, task), {})[len(runs)] = str(sample["after"])
            if answered:
                label = group.label + (f", seed {run.seed}" if len(group.runs) > 1 else "")
                runs.append({
                    "label": label, "number": badge["number"], "colour": badge["colour"],
                    "shown": is_first,
                })  # fmt: skip
                is_first = False
    shown = [run for run in runs if run["shown"]]
    for hidden in shown[SHOWN:]:
        hidden["shown"] = False
    return runs, rows
