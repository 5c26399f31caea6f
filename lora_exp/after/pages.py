"""What the commands print for people: tables of their reports. Needs no torch."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lora_exp.record.console import facts, short, size
from lora_exp.record.ranking import sweep_table
from lora_exp.record.sweep import read_rows

STATES = {"ok": "green", "warning": "yellow", "wrong": "bold red", "known": ""}
SHADES = ("", "cyan", "green", "yellow", "bold red")  # of a norm, from none to the largest


def inspection(report: Mapping[str, Any]) -> RenderableType:
    """Return the page of `lora-exp inspect`."""
    if report["kind"] == "sweep":
        return _sweep(report)
    parts = [_adapter(report) if report["kind"] == "adapter" else _model(report)]
    if report.get("modules"):
        parts.append(changed(report["modules"]))
    if report["run"]:
        parts.append(_run(report["run"]))
    files = {name: size(count) for name, count in report["files"].items()}
    return Group(*parts, facts("files", files))


def _adapter(report: Mapping[str, Any]) -> Table:
    settings = {
        key: value for key, value in report["settings"].items() if value not in (False, "none")
    }
    lines = {
        "path": report["path"],
        "method": " ".join([report["method"], *(f"{k}={v}" for k, v in settings.items())]),
        "targets": _listed(report["targets"]),
        "trains whole": _listed(report["modules_to_save"]),
        "base": f"{report['base']} at {report['base_revision'] or 'an unknown revision'}",
        "task": report["task_type"],
        "size": f"{report['parameters']:,} parameters, {size(report['bytes'])} of"
        f" {', '.join(report['dtypes'])}",
        "weights": "finite" if report["finite"] else "NOT FINITE: the adapter is broken",
    }
    return facts("adapter", {key: value for key, value in lines.items() if value})


def _model(report: Mapping[str, Any]) -> Table:
    lines = {
        "path": report["path"],
        "architecture": f"{report['architecture']}, {report['layers']} layers of"
        f" {report['hidden_size']}, {report['vocabulary']} tokens",
        "size": f"{report['parameters']:,} parameters, {size(report['bytes'])} of"
        f" {', '.join(report['dtypes'])}",
    }
    if merge := report["merged_from"]:
        names = ", ".join(each["name"] for each in merge["adapters"])
        lines["merged from"] = f"{names} into the {merge['into']} {merge['base']['path']}"
    return facts("model", lines)


def changed(modules: list[dict[str, Any]]) -> Table:
    """Return a table of norms: a row for each layer, a column for each kind of module."""
    layers: dict[str, dict[str, float]] = {}
    for module in modules:
        parent, _, kind = module["name"].rpartition(".")
        layer = next((part for part in parent.split(".") if part.isdigit()), parent or "-")
        cells = layers.setdefault(layer, {})
        for name, value in _norms(module, kind):
            cells[name] = cells.get(name, 0.0) + (math.nan if value is None else value)
    columns = list(dict.fromkeys(name for cells in layers.values() for name in cells))
    norms = [norm for cells in layers.values() for norm in cells.values()]
    largest = max((norm for norm in norms if math.isfinite(norm)), default=0.0)
    ranks = {(m["r"], m["lora_alpha"]) for m in modules if "r" in m}
    title = "norm of each module's update" if ranks else "norm of each module's saved tensors"
    if len(ranks) == 1:
        (r, alpha), *_ = ranks
        title += f" (r {r}, alpha {alpha:g} everywhere)"
    elif ranks:
        title += f" (r {min(ranks)[0]} to {max(ranks)[0]}; --json has each)"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("layer", style="dim")
    for name in columns:
        table.add_column(name, justify="right")
    for layer, cells in layers.items():
        table.add_row(layer, *(_cell(cells.get(name), largest) for name in columns))
    return table


def _norms(module: Mapping[str, Any], kind: str) -> Iterable[tuple[str, float | None]]:
    """Return the columns of a module: two for stacked experts, whose norms differ."""
    if "experts" not in module:
        return [(kind, module["norm"])]
    columns = (("largest", module["norm"]), ("mean", module["mean_norm"]))
    return [(f"{kind}, {which} of {module['experts']}", norm) for which, norm in columns]


def _cell(norm: float | None, largest: float) -> Text:
    if norm is None:
        return Text("")
    if not math.isfinite(norm):
        return Text("not finite", style="bold red")
    shade = round((len(SHADES) - 1) * norm / largest) if largest else 0
    return Text(short(norm), style=SHADES[shade])


def _run(run: Mapping[str, Any]) -> Table:
    lines = {"path": run["path"], "name": run.get("name"), "status": run.get("standing")}
    lines["chosen"] = ", ".join(f"{k}={v}" for k, v in (run.get("choices") or {}).items())
    lines["data"] = ", ".join(
        f"{name} ({version[:19]})" for name, version in (run.get("data") or {}).items()
    )
    metrics = run.get("metrics") or {}
    lines |= {k: short(v) for k, v in sorted(metrics.items()) if k.startswith(("before/", "eval/"))}
    return facts("run", {key: str(value) for key, value in lines.items() if value})


def _sweep(report: Mapping[str, Any]) -> RenderableType:
    folder = Path(report["path"])
    table = sweep_table(folder, read_rows(folder))
    none = "none: no job has finished, or they are not judged alike"
    return Group(table, Text(f"best: {report['best'] or none}"))


def examination(results: Mapping[str, str | None]) -> Table:
    """Return the page of `lora-exp check` without an adapter."""
    lines = (("wrong" if fault else "ok", what, fault or "") for what, fault in results.items())
    return _findings("check", lines)


def doctor(findings: Iterable[Mapping[str, str]]) -> Table:
    """Return the page of `lora-exp doctor`."""
    return _findings("doctor", ((f["state"], f["what"], f["details"]) for f in findings))


def models(rows: Iterable[Mapping[str, Any]]) -> RenderableType:
    """Return the page of `lora-exp models`."""
    table = Table(box=None)
    table.add_column("model=", no_wrap=True)
    table.add_column("", overflow="fold")
    table.add_column("licence")
    for name in ("parameters", "bfloat16", "int8", "nf4"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        count, sizes = row["parameters"], row["bytes"]
        numbers = ["-"] * 4
        if count is not None:
            parameters = f"{count / 1e9:.2f}B" if count >= 1e8 else f"{count / 1e6:.1f}M"
            in_gib = (f"{sizes[quant] / 2**30:.2f}" for quant in ("none", "int8", "nf4"))
            numbers = [parameters, *in_gib]
        table.add_row(row["option"], row["path"] or "-", row["licence"] or "-", *numbers)
    text = "GiB of the weights (int8: experts in floats); of a run: lora-exp estimate model=..."
    tried = "What works on each kind: docs/models.md. Any other model: model=local model.path=..."
    return Group(table, Text(f"{text}\n{tried}", style="dim"))


def proof(report: Mapping[str, Any]) -> RenderableType:
    """Return the page of `lora-exp check --adapter`."""
    rounding = report["rounding"]
    alone = f"; rounding alone: {rounding:.3g}" if rounding else ""
    lines = {
        "reference": report["reference"],
        "merged weights": report["dtype"],
        "prompts": f"{report['prompts']}, {report['tokens']:,} tokens compared",
        "largest difference": f"{report['max_difference']:.3g} of a logit"
        f" (tolerance: {report['tolerance']:.3g}{alone};"
        f" the adapter itself: {report['effect']:.3g})",
        "mean difference": f"{report['mean_difference']:.3g}",
        "KL": f"{report['kl']:.3g} nats a token",
        "same next token": f"{report['top1_agreement']:.2%}",
        "same greedy answer": f"{report['same_text']:.0%} of the prompts",
    }
    if report["same_experts"] is not None:
        lines["same experts"] = f"{report['same_experts']:.2%}"
    verdict = "the merged model is the adapter on its base"
    if report["rounded_off"]:
        verdict = f"NOT the same model: {report['dtype']} rounds too much; --dtype float32 does not"
    elif not report["holds"]:
        verdict = "NOT the same model: was it merged from this adapter, into this base?"
    style = "bold green" if report["holds"] else "bold red"
    return Group(facts("check", lines), Text(verdict, style=style))


def evaluation(report: Mapping[str, Any]) -> RenderableType:
    """Return the page of `lora-exp evaluate`."""
    results = report["results"]
    has_base = "base" in results
    title = f"{report['path']} on {', '.join(report['data'])}"
    table = Table(box=None)
    table.add_column("", style="dim", no_wrap=True)
    for name in [*results, *(["difference"] if has_base else [])]:
        table.add_column(name, justify="right")
    for metric in next(iter(results.values())):
        values = [metrics[metric] for metrics in results.values()]
        difference = [f"{values[1] - values[0]:+.4g}"] if has_base else []
        table.add_row(Text(metric.replace("_", " ")), *map(short, values), *difference)
    if "tokens" not in report:  # a reward model's pairs
        return Group(Text(title, style="bold"), table, Text(f"{report['rows']} pairs", style="dim"))
    counts = f"{report['rows']} rows: {report['with_loss']} with a loss"
    counts += f" ({report['tokens']:,} tokens), {report['with_answer']} with a known answer"
    if report["truncated"]:
        counts += f"; {report['truncated']} cut to the model's context"
    return Group(Text(title, style="bold"), table, Text(counts, style="dim"))


def serving(url: str, chats: Mapping[str, bool]) -> str:
    """Return what `lora-exp serve` prints once it listens: plain lines, to copy the last one.

    Args:
        url: of the server.
        chats: each model's name, and whether it has a chat template.
    """
    name, chat = next(iter(chats.items()))
    path, fields = "completions", {"prompt": "Once upon a time", "max_tokens": 64}
    if chat:
        turns = [{"role": "user", "content": "Who are you?"}]
        path, fields = "chat/completions", {"messages": turns, "temperature": 0}
    body = shlex.quote(json.dumps({"model": name} | fields))
    lines = [f"serving {', '.join(chats)} on {url} (Ctrl-C ends it)"]
    if texts := [name for name, chat in chats.items() if not chat]:
        lines.append(f"no chat template: of {', '.join(texts)} only /v1/completions works")
    return "\n".join([*lines, f"curl {url}/{path} -H 'Content-Type: application/json' -d {body}"])


def parcel(files: Mapping[str, int], target: str) -> RenderableType:
    """Return the page of `lora-exp push`.

    Args:
        files: the uploaded files, and their sizes.
        target: where they went, or would go.
    """
    sizes = {name: size(count) for name, count in files.items()}
    return Group(facts(f"{size(sum(files.values()))} in {len(files)} files", sizes), target)


def estimate(report: Mapping[str, Any]) -> RenderableType:
    """Return the page of `lora-exp estimate`: a column for each variant, the chosen one marked."""
    table = Table(box=None)
    table.add_column("", style="dim", no_wrap=True)
    rows = [row for row in report["rows"] if "refused" not in row]
    for row in rows:
        mark, style = ("> ", "bold") if row["chosen"] else ("", "")
        table.add_column(f"{mark}{_variant_name(row)}", justify="right", style=style, no_wrap=True)
    table.add_row("trainable", *(f"{row['trainable']:,}" for row in rows))
    for part in ("saved", "weights", "gradients", "optimizer", "activations", "total", "measured"):
        sizes = (size(row[part]) if row[part] is not None else "-" for row in rows)
        table.add_row(part, *sizes, end_section=part == "activations")
    title = f"{report['name']}: {report['model']}, {report['parameters']:,} parameters"
    return Group(Text(title, style="bold"), table, *_notes(report))


def _variant_name(row: Mapping[str, Any]) -> str:
    method = "every weight" if row["peft"] == "none" else row["peft"]
    return method if row["quant"] == "none" else f"{method}, {row['quant']}"


def _notes(report: Mapping[str, Any]) -> list[Text]:
    unknown = "" if report["optimizer_known"] else ", which is not known: counted as AdamW"
    lines = [
        f"a step has up to {report['tokens']:,} tokens; activations are computed by a formula,"
        f" rather too high; optimizer {report['optimizer']}{unknown}"
    ]
    for row in report["rows"]:
        if "refused" in row:
            lines.append(f"{_variant_name(row)}: {row['refused']}")
        elif row["run"]:
            text = f"measured: the peak of {row['run']}"
            lines.append(f"{text}; on a CPU it is that of the process, about 0.5 GiB more")
    return [Text(line, style="dim") for line in lines]


def _findings(title: str, lines: Iterable[tuple[str, str, str]]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None
    )
    for state, what, text in lines:
        mark = Text("" if state == "known" else state, style=STATES[state])
        table.add_row(mark, Text(what), Text(text))  # [extra] is no markup
    return table


def _listed(names: Any) -> str:
    return ", ".join(names) if isinstance(names, list) else str(names or "")
