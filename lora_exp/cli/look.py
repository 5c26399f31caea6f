"""Commands of the help panel Look: runs, compare, inspect, check, evaluate, doctor, models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_exp import libraries
from lora_exp.cli.options import (
    Base,
    DeviceMap,
    DevicesOption,
    Force,
    Json,
    QuantOption,
    SavedPath,
    check_exists,
    on_devices,
    print_result,
)
from lora_exp.files.strict import dumps

if TYPE_CHECKING:
    from lora_exp.runs.run import SavedRun


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="default: outputs and multirun"),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(help="which: 'peft.r>=16 and status=finished'; = != < <= > >= ~ and or ( )"),
    ] = None,
    sort: Annotated[
        str, typer.Option(metavar="KEY", help="with a minus before it, the largest first")
    ] = "-date",
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B...", help="keys of the row, a metric, or the config"),
    ] = None,
    delete_checkpoints: Annotated[
        bool, typer.Option("--delete-checkpoints", help="of these runs, after a question")
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="delete also those needed to resume runs")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="delete without a question")] = False,
    as_json: Json = False,
) -> None:
    """List runs: status, objective, what differs, steps, time, size; with --where, some of them."""
    if (unfinished or yes) and not delete_checkpoints:
        raise typer.BadParameter(
            "--yes and --unfinished need it", param_hint="--delete-checkpoints"
        )
    if delete_checkpoints and as_json:
        raise typer.BadParameter("is for lists", param_hint="--json")
    from lora_exp.record.console import console
    from lora_exp.runs import listing
    from lora_exp.runs.overview import overview

    keys = columns.split(",") if columns else list(listing.COLUMNS)
    rows = listing.select(folders, where, sort, keys)
    if delete_checkpoints:
        _delete_checkpoints([row.run for row in rows], unfinished, yes)
        return
    if as_json:
        print(dumps(listing.as_json(rows, keys), indent=1))
    else:
        print(overview(rows, keys, console.width if console.is_terminal else None))


def _delete_checkpoints(runs: list[SavedRun], unfinished: bool, yes: bool) -> None:
    """Say what would be deleted, ask, and delete it."""
    from lora_exp.record.console import size
    from lora_exp.runs.checkpoints import delete, plan_deletions

    planned = plan_deletions(runs, unfinished)
    print(planned.text())
    if not planned.deletions:
        return
    if not yes and not typer.confirm("Delete them for good?"):
        print("nothing was deleted")
        return
    deleted, failures = delete(planned)
    print(f"{size(deleted)} deleted")
    for failure in failures:
        print(f"not deleted: {failure}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def inspect(path: SavedPath, as_json: Json = False) -> None:
    """Show what an adapter, run, sweep or model is, and which of its layers changed."""
    check_exists(path)
    from lora_exp.after.inspection import inspect as look
    from lora_exp.after.pages import inspection

    report = look(path)
    print_result(report, inspection, as_json)
    if not report.get("finite", True):
        raise typer.Exit(1)


def compare(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="runs, sweeps, or folders of them")
    ],
    against: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="the baseline, by directory or name; default: the best"),
    ] = None,
    as_json: Json = False,
    table: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="write the table to a file, too")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="write a report with figures, as HTML"),
    ] = None,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="save a W&B workspace of the runs that were sent to it")
    ] = False,
) -> None:
    """Compare runs of any day: seeds together, differences with intervals, costs."""
    from lora_exp.comparison.table import as_json as values
    from lora_exp.comparison.table import page, write_csv
    from lora_exp.comparison.value import compare as compare_runs

    comparison = compare_runs(*paths, against=against)
    print_result(values(comparison) if as_json else comparison, page, as_json)
    if table is not None:
        write_csv(comparison, table)
    if report is not None:
        from lora_exp.comparison.report import write_report

        write_report(comparison, report)
    if wandb:
        from lora_exp.comparison.report import title_of
        from lora_exp.comparison.workspace import save_workspaces

        for address in save_workspaces(comparison, title_of(comparison)):
            print(address, file=sys.stderr if as_json else sys.stdout)


def check(
    merged: Annotated[str, typer.Argument(metavar="MODEL", help="a merged or whole model")],
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            help="the adapter, or its run, that it was merged from; repeat it for several"
        ),
    ] = None,
    base: Base = None,
    quant: QuantOption = None,
    device_map: DevicesOption = DeviceMap.one,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with a prompt each; default: the run's own")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="of each greedy answer", min=1)] = 32,
    as_json: Json = False,
) -> None:
    """Prove that a merged model is its adapter on its base; without --adapter, that it works."""
    if not adapter and (prompts or base or quant):
        raise typer.BadParameter("--prompts, --base and --quant need it", param_hint="--adapter")
    check_exists(merged, *(adapter or []))
    libraries.load(training=False, freeze=True)
    from lora_exp.after import pages, proof, soundness

    if not adapter:
        with on_devices(device_map):
            checks = soundness.check_model(merged)
        print_result(checks, pages.examination, as_json)
        holds = not any(checks.values())
    else:
        with on_devices(device_map):
            comparison = proof.prove(
                merged, adapter, base, quant and quant.value, prompts, max_new_tokens
            )
        print_result(comparison.values(), pages.proof, as_json)
        holds = comparison.holds
    if not holds:
        raise typer.Exit(1)


def evaluate(
    path: SavedPath,
    data: Annotated[
        str | None,
        typer.Option(
            help="JSON lines (or a glob) with known answers; default: the run's held-out rows"
        ),
    ] = None,
    base: Base = None,
    quant: QuantOption = None,
    device_map: DevicesOption = DeviceMap.one,
    max_new_tokens: Annotated[int, typer.Option(help="of each greedy answer", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="rows at a time", min=1)] = 16,
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="a JSON file to write to, too")
    ] = None,
    force: Force = False,
) -> None:
    """Measure loss, exact match, ROUGE-L and BLEU, with the adapter and without it."""
    check_exists(path)
    libraries.load(training=False, freeze=True)
    from lora_exp.after import evaluation, pages

    with on_devices(device_map):
        results = evaluation.evaluate(
            path, data, base, quant and quant.value, max_new_tokens, batch_size, out, force
        )
    print_result(results, pages.evaluation, as_json)


def doctor(as_json: Json = False) -> None:
    """See whether this machine can train, and what to do where it cannot."""
    from dataclasses import asdict

    from lora_exp.after import pages
    from lora_exp.after.doctor import diagnose

    findings = [asdict(finding) for finding in diagnose()]
    print_result(findings, pages.doctor, as_json)
    if any(finding["state"] == "wrong" for finding in findings):
        raise typer.Exit(1)


def models(as_json: Json = False) -> None:
    """List the models that can be named: licence, size and memory by quantisation."""
    from lora_exp.after import models as listed
    from lora_exp.after import pages

    print_result(listed.models(), pages.models, as_json)
