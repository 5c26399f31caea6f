"""The report: a comparison as one page of HTML that needs nothing else."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.comparison import sections
from lora_exp.comparison.answers import answers
from lora_exp.comparison.decision import Compared, decision, tiles
from lora_exp.comparison.figures import figures
from lora_exp.comparison.theme import COLOURS, DARK, FILL, OTHERS, Figure, translucent
from lora_exp.files.strict import finite

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent / "template"  # the template, its style and its behaviour
WIDE = ("evaluation", "by_key", "parallel", "costs")  # figures that take a row for themselves


def html(compared: Compared, title: str) -> str:
    """Return the report of a comparison; equal comparisons give equal bytes."""
    headline, lede = decision(compared, compared.objectives[0])
    for objective in compared.objectives[1:]:
        lede.append(decision(compared, objective)[0])
    plotly = files("plotly") / "package_data" / "plotly.min.js"
    texts = {"css": FOLDER / "report.css", "js": FOLDER / "report.js", "plotly": plotly}
    page = _environment().get_template("report.html.jinja").render(
        title=title, headline=headline, lede=lede, tiles=tiles(compared),
        warnings=compared.warnings, wide=WIDE, version=version("lora-exp"), dark=_dark(),
        **_content(compared),
        **{name: path.read_text(encoding="utf-8") for name, path in texts.items()},
    )  # fmt: skip
    return page.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair


def embedded(value: Any) -> str:
    """Return JSON that is safe inside `<script>`: ASCII, no tag can begin or end in it."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _content(compared: Compared) -> dict[str, Any]:
    """Return the tables, figures and answers that the template shows."""
    parts: list[dict[str, Any]] = []
    drawn: dict[str, Figure] = {}
    marks: list[sections.Badge] = []
    for objective in compared.objectives:
        groups = compared.of(objective)
        own = sections.badges(groups, len(marks))
        suffix = f"-{len(parts) + 1}" if parts else ""
        made = figures(groups, objective, groups[0].goal)
        parts.append({
            "objective": objective, "id": f"groups{suffix}", "badges": own,
            "table": sections.group_table(groups, compared.keys, own),
            "figures": {f"{name}{suffix}": figure for name, figure in made.items()},
            "first": len(marks),
            "packed": any(group.cost.of_pack for group in groups),
        })  # fmt: skip
        drawn |= parts[-1]["figures"]
        marks += own
    groups = list(compared.groups)
    samples = answers(groups, marks)
    runs = [run for group in groups for run in group.runs]
    return {
        "parts": parts, "drawn": drawn, "samples": samples,
        "tasks": sorted({row["task"] for row in samples["rows"]} - {""}) if samples else [],
        "differences": sections.differences(groups), "stops": sections.stops(groups, marks),
        "plan": sections.plan_text(runs), "runs": sections.run_table(groups, marks),
        "details": sections.details(groups, marks), "coloured": len(COLOURS),
    }  # fmt: skip


def _dark() -> dict[str, str]:
    """Return for each colour of the figures the one on dark paper."""
    fills = {translucent(c, FILL): translucent(DARK[c], 1.4 * FILL) for c in (*COLOURS, OTHERS)}
    return DARK | fills


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters["embedded"] = embedded
    return made
