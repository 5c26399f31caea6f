"""What the commands print for people: tables of what was found. Needs no torch."""

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
from lora_exp.record.sweep import drawn, read_rows

STATES = {"ok": "green", "warning": "yellow", "wrong": "bold red", "known": ""}
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
        norm = math.nan if module["norm"] is None else module["norm"]
        cells[last] = cells.get(last, 0.0) + norm
    columns = list(dict.fromkeys(name for cells in places.values() for name in cells))
    norms = [norm for cells in places.values() for norm in cells.values()]
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
    for layer, cells in places.items():
        table.add_row(layer, *(_cell(cells.get(name), largest) for name in columns))
    return table


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
        f"{name} ({known[:19]})" for name, known in (run.get("data") or {}).items()
    )
    metrics = run.get("metrics") or {}
    lines |= {k: short(v) for k, v in sorted(metrics.items()) if k.startswith(("before/", "eval/"))}
    return facts("run", {key: str(value) for key, value in lines.items() if value})


def _sweep(found: Mapping[str, Any]) -> RenderableType:
    folder = Path(found["path"])
    table = drawn(folder, read_rows(folder))
    return Group(table, Text(f"best: {found['best'] or 'no job has finished'}"))


def examination(found: Mapping[str, str | None]) -> Table:
    """Return the page of `lora-exp check` without an adapter."""
    states = (("wrong" if wrong else "ok", what, wrong or "") for what, wrong in found.items())
    return _findings("check", states)


def doctor(found: Iterable[Mapping[str, str]]) -> Table:
    """Return the page of `lora-exp doctor`."""
    return _findings("doctor", ((each["state"], each["what"], each["told"]) for each in found))


def proof(found: Mapping[str, Any]) -> RenderableType:
    """Return the page of `lora-exp check --adapter`."""
    lines = {
        "reference": found["reference"],
        "merged weights": found["dtype"],
        "prompts": f"{found['prompts']}, {found['tokens']:,} tokens compared",
        "largest difference": f"{found['max_difference']:.3g} of a logit"
        f" (let pass: {found['tolerance']:.3g}; the adapter itself: {found['effect']:.3g})",
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


def evaluation(found: Mapping[str, Any]) -> RenderableType:
    """Return the page of `lora-exp evaluate`."""
    results = found["results"]
    both = "base" in results
    title = f"{found['path']} on {', '.join(found['data'])}"
    table = Table(box=None)
    table.add_column("", style="dim", no_wrap=True)
    for name in [*results, *(["difference"] if both else [])]:
        table.add_column(name, justify="right")
    for metric in next(iter(results.values())):
        values = [own[metric] for own in results.values()]
        change = [f"{values[1] - values[0]:+.4g}"] if both else []
        table.add_row(Text(metric.replace("_", " ")), *map(short, values), *change)
    if "tokens" not in found:  # a reward model's pairs
        return Group(Text(title, style="bold"), table, Text(f"{found['rows']} pairs", style="dim"))
    told = f"{found['rows']} rows: {found['with_loss']} with a loss ({found['tokens']:,} tokens), "
    told += f"{found['with_answer']} with a known answer"
    if found["truncated"]:
        told += f"; {found['truncated']} cut to the model's context"
    return Group(Text(title, style="bold"), table, Text(told, style="dim"))


def serving(url: str, chats: Mapping[str, bool]) -> str:
    """Return what `lora-exp serve` says once it listens, as plain lines: one is to be pasted.

    Args:
        url: of the server.
        chats: each model's name, and whether it has a chat template.
    """
    name, chat = next(iter(chats.items()))
    path, asked = "completions", {"prompt": "Once upon a time", "max_tokens": 64}
    if chat:
        turns = [{"role": "user", "content": "Who are you?"}]
        path, asked = "chat/completions", {"messages": turns, "temperature": 0}
    body = shlex.quote(json.dumps({"model": name} | asked))
    lines = [f"serving {', '.join(chats)} on {url} (Ctrl-C ends it)"]
    if texts := [name for name, chat in chats.items() if not chat]:
        lines.append(f"no chat template: of {', '.join(texts)} only /v1/completions works")
    return "\n".join([*lines, f"curl {url}/{path} -H 'Content-Type: application/json' -d {body}"])


def parcel(files: Mapping[str, int], target: str) -> RenderableType:
    """Return the page of `lora-exp push`.

    Args:
        files: what is sent, and its sizes.
        target: where it goes, or what became of it.
    """
    sizes = {name: size_of(count) for name, count in files.items()}
    return Group(facts(f"{size_of(sum(files.values()))} in {len(files)} files", sizes), target)


def estimate(found: Mapping[str, Any]) -> RenderableType:
    """Return the page of `lora-exp estimate`: a column for each way, the chosen one marked."""
    table = Table(box=None)
    table.add_column("", style="dim", no_wrap=True)
    rows = [row for row in found["rows"] if "refused" not in row]
    for row in rows:
        mark, style = ("> ", "bold") if row["chosen"] else ("", "")
        table.add_column(f"{mark}{_way(row)}", justify="right", style=style, no_wrap=True)
    table.add_row("trainable", *(f"{row['trainable']:,}" for row in rows))
    for part in ("saved", "weights", "gradients", "optimizer", "activations", "total", "measured"):
        sizes = (size_of(row[part]) if row[part] is not None else "-" for row in rows)
        table.add_row(part, *sizes, end_section=part == "activations")
    title = f"{found['name']}: {found['model']}, {found['parameters']:,} parameters"
    return Group(Text(title, style="bold"), table, *_notes(found))


def _way(row: Mapping[str, Any]) -> str:
    method = "every weight" if row["peft"] == "none" else row["peft"]
    return method if row["quant"] == "none" else f"{method}, {row['quant']}"


def _notes(found: Mapping[str, Any]) -> list[Text]:
    known = "" if found["optimizer_known"] else ", which is not known: counted as AdamW"
    lines = [
        f"a step has up to {found['tokens']:,} tokens; its activations are a formula's, rather"
        f" too high; optimizer {found['optimizer']}{known}"
    ]
    for row in found["rows"]:
        if "refused" in row:
            lines.append(f"{_way(row)}: {row['refused']}")
        elif row["run"]:
            told = f"measured: the peak of {row['run']}"
            lines.append(f"{told}; on a CPU that of the process, about 0.5 GiB more")
    return [Text(line, style="dim") for line in lines]


def _findings(title: str, lines: Iterable[tuple[str, str, str]]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None
    )
    for state, what, told in lines:
        mark = Text("" if state == "known" else state, style=STATES[state])
        table.add_row(mark, Text(what), Text(told))  # [extra] is no markup
    return table


def _listed(names: Any) -> str:
    return ", ".join(names) if isinstance(names, list) else str(names or "")


def size_of(count: int) -> str:
    """Write a number of bytes, small ones in kB."""
    return size(count) if count >= 2**20 else f"{count / 1024:.1f} KiB"
