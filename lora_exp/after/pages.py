"""What the commands print for people: tables of what was found. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_exp.console import facts, short, size

SHADES = ("", "cyan", "green", "yellow", "bold red")  # of a norm, from none to the largest


def inspection(found: Mapping[str, Any]) -> RenderableType:
    """Return the page of `lora-exp inspect`."""
    if found["kind"] == "sweep":
        return _sweep(found)
    parts = [_adapter(found) if found["kind"] == "adapter" else _model(found)]
    if found.get("modules"):
        parts.append(changed(found["modules"]))
    if found["run"]:
        parts.append(_run(found["run"]))
    files = {name: size_of(count) for name, count in found["files"].items()}
    return Group(*parts, facts("files", files))


def _adapter(found: Mapping[str, Any]) -> Table:
    settings = {
        key: value for key, value in found["settings"].items() if value not in (False, "none")
    }
    lines = {
        "path": found["path"],
        "method": " ".join([found["method"], *(f"{k}={v}" for k, v in settings.items())]),
        "targets": _listed(found["targets"]),
        "trains whole": _listed(found["modules_to_save"]),
        "base": f"{found['base']} at {found['base_revision'] or 'an unknown revision'}",
        "task": found["task_type"],
        "size": f"{found['parameters']:,} parameters, {size_of(found['bytes'])} of"
        f" {', '.join(found['dtypes'])}",
        "weights": "finite" if found["finite"] else "NOT FINITE: the adapter is broken",
    }
    return facts("adapter", {key: value for key, value in lines.items() if value})


def _model(found: Mapping[str, Any]) -> Table:
    lines = {
        "path": found["path"],
        "architecture": f"{found['architecture']}, {found['layers']} layers of"
        f" {found['hidden_size']}, {found['vocabulary']} tokens",
        "size": f"{found['parameters']:,} parameters, {size_of(found['bytes'])} of"
        f" {', '.join(found['dtypes'])}",
    }
    if merge := found["merged_from"]:
        names = ", ".join(each["name"] for each in merge["adapters"])
        lines["merged from"] = f"{names} into the {merge['into']} {merge['base']['path']}"
    return facts("model", lines)


def changed(modules: list[dict[str, Any]]) -> Table:
    """Return a map of what changed: a row for each layer, a column for each kind of module."""
    places: dict[str, dict[str, float]] = {}
    for module in modules:
        row, _, last = module["name"].rpartition(".")
        layer = next((part for part in row.split(".") if part.isdigit()), row or "-")
        cells = places.setdefault(layer, {})
        cells[last] = cells.get(last, 0.0) + module["norm"]
    columns = list(dict.fromkeys(name for cells in places.values() for name in cells))
    largest = max((norm for cells in places.values() for norm in cells.values()), default=0.0)
    ranks = {(m["r"], m["lora_alpha"]) for m in modules if "r" in m}
    title = "norm of each module's update" if ranks else "norm of each module's saved tensors"
    if len(ranks) == 1:
        (r, alpha), *_ = ranks
        title += f" (r {r}, alpha {alpha:g} everywhere)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("layer", style="dim")
    for name in columns:
        table.add_column(name, justify="right")
    for layer, cells in places.items():
        table.add_row(layer, *(_cell(cells.get(name), largest) for name in columns))
    if len(ranks) > 1:
        for module in modules:
            what = f"r {module['r']}, alpha {module['lora_alpha']:g}" if "r" in module else ""
            table.add_section()
            table.add_row(module["name"], what)
    return table


def _cell(norm: float | None, largest: float) -> Text:
    if norm is None:
        return Text("")
    shade = round((len(SHADES) - 1) * norm / largest) if largest else 0
    return Text(short(norm), style=SHADES[shade])


def _run(run: Mapping[str, Any]) -> Table:
    lines = {"path": run["path"], "name": run.get("name"), "status": run.get("status")}
    lines["chosen"] = ", ".join(f"{k}={v}" for k, v in (run.get("choices") or {}).items())
    lines["data"] = ", ".join(
        f"{name} ({known[:19]})" for name, known in (run.get("data") or {}).items()
    )
    metrics = run.get("metrics") or {}
    lines |= {k: short(v) for k, v in sorted(metrics.items()) if k.startswith(("before/", "eval/"))}
    return facts("run", {key: str(value) for key, value in lines.items() if value})


def _sweep(found: Mapping[str, Any]) -> Table:
    table = Table(title=found["path"], title_justify="left", title_style="bold", box=None)
    for column in ("run", "name", "status", "objective", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for job in found["jobs"]:
        value = short(job["value"]) if job["value"] is not None else ""
        table.add_row(job["path"], job["name"], job["status"], job["objective"] or "", value)
    return table


def examination(found: Mapping[str, str | None]) -> Table:
    """Return the page of `lora-exp check` without an adapter."""
    return _verdicts("check", {what: (wrong is None, wrong or "") for what, wrong in found.items()})


def proof(found: Mapping[str, Any]) -> RenderableType:
    """Return the page of `lora-exp check --adapter`."""
    lines = {
        "reference": found["reference"],
        "merged weights": found["dtype"],
        "prompts": f"{found['prompts']}, {found['tokens']:,} tokens compared",
        "largest difference": f"{found['max_difference']:.3g} of a logit"
        f" (let pass: {found['tolerance']:.3g}; largest logit {found['largest_logit']:.1f})",
        "mean difference": f"{found['mean_difference']:.3g}",
        "KL": f"{found['kl']:.3g} nats a token",
        "same next token": f"{found['top1_agreement']:.2%}",
        "same greedy answer": f"{found['same_text']:.0%} of the prompts",
    }
    verdict = (
        "the merged model is the adapter on its base"
        if found["holds"]
        else ("NOT the same model: was it merged from this adapter, into this base?")
    )
    style = "bold green" if found["holds"] else "bold red"
    return Group(facts("check", lines), Text(verdict, style=style))


def _verdicts(title: str, lines: Mapping[str, tuple[bool, str]]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None
    )
    for what, (good, told) in lines.items():
        mark = Text("ok", style="green") if good else Text("wrong", style="bold red")
        table.add_row(mark, what, Text(told))
    return table


def _listed(names: Any) -> str:
    return ", ".join(names) if isinstance(names, list) else str(names or "")


def size_of(count: int) -> str:
    """Write a number of bytes, small ones in kB."""
    return size(count) if count >= 2**20 else f"{count / 1024:.1f} KiB"
