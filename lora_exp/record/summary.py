"""What a run prints before training (base, adapter, rows) and after it (metrics, paths)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text

from lora_exp.adapter.attach import Adapted
from lora_exp.config.processes import shares_text
from lora_exp.data.examples import first
from lora_exp.data.rows import Rows
from lora_exp.data.tokens import Counts, Tokens
from lora_exp.files.paths import is_scratch
from lora_exp.model.loading import Base
from lora_exp.record.console import curve, facts, print_and_log, size
from lora_exp.record.progress import preview
from lora_exp.record.run import Record
from lora_exp.record.standing import ALMOST_ALL

FIELDS = (
    "prompt", "completion", "messages", "text", "chosen", "rejected", "label", "tools", "answer",
    "task",
)  # fmt: skip


def counts(adapted: Adapted, train: Tokens, held_out: Tokens | None) -> dict[str, int]:
    """Return the counts known before training (parameters, rows, tokens), for the record."""
    numbers = {"trainable_parameters": adapted.trainable, "parameters": adapted.total}
    numbers |= {f"train_{k}": v for k, v in vars(train.counts).items()}
    return numbers | (
        {f"eval_{k}": v for k, v in vars(held_out.counts).items()} if held_out else {}
    )


def announce(
    cfg: DictConfig,
    rows: Rows,
    base: Base,
    adapted: Adapted,
    train: Tokens,
    held_out: Tokens | None,
) -> None:
    """Print the base, adapter and rows, and the first row with the tokens that count."""
    lines: dict[str, str | Text] = {
        "base": _base(base),
        "quantisation": _quantisation(cfg, base),
        "adapter": _adapter(cfg, adapted),
        "adapted": ", ".join(f"{name} x{n}" for name, n in adapted.modules.items()) or "-",
        "not adapted": _left_out(adapted),
        "trainable": f"{adapted.trainable:,} of {adapted.total:,} parameters"
        f" ({adapted.trainable / adapted.total:.2%})",
        "algorithm": f"{cfg.choices.algorithm}, learning rate {cfg.train.learning_rate:g}",
        "processes": shares_text(cfg),
        "reference": _reference(cfg),
        "rewards": _rewards(cfg),
        "rows": _rows(train.counts, f", read as {rows.format}{', cached' * train.cached}"),
        "lengths": _lengths(cfg, train),
        "not used": ", ".join(unused(rows)) if "rewards" not in cfg.algorithm else "",
        "held out": _rows(held_out.counts) if held_out else "none: no evaluation",
    }
    print_and_log(facts(cfg.name, {key: line for key, line in lines.items() if line}))
    for warning in (*base.warnings, *rows.warnings):
        print_and_log(f"[yellow]{warning}[/]")
    print_and_log("\nfirst row; what counts towards the loss is in «»:")
    for name, ids, labels in first(train, base.tokenizer):
        if name:
            print_and_log(f"[dim]{name}:[/]")
        print_and_log(preview(ids, labels, base.tokenizer))
    print_and_log("")


def _base(base: Base) -> str:
    """Return the base's class, and what it leaves out."""
    left_out = f", the language model of {base.text_of}" if base.text_of else ""
    return f"{base.path}  {type(base.model).__name__}{left_out}, {base.dtype}, {base.attention}"


def _quantisation(cfg: DictConfig, base: Base) -> Text:
    """Return how the base is quantised, and how much of its layers."""
    text = Text(base.held or cfg.choices.quant)
    if base.quantised is not None:
        share, in_floats = base.quantised
        rest = f"; in floats: {in_floats}" if share < ALMOST_ALL else ""
        text.append(f", {share:.0%} of the layers' weights{rest}", style="yellow" if rest else "")
    return text


def _reference(cfg: DictConfig) -> str:
    """Return the reference of the KL divergence; empty: there is none."""
    args = cfg.algorithm.args
    if "beta" not in args or not args.beta:
        return ""
    if cfg.adapter is not None:
        return f"the adapter that the run starts from, {cfg.adapter}"
    return "the base, adapter off" if cfg.peft is not None else "a frozen copy of the base"


def _rewards(cfg: DictConfig) -> str:
    rewards = cfg.algorithm.rewards if "rewards" in cfg.algorithm else ()
    return ", ".join(r if isinstance(r, str) else r["_target_"] for r in rewards)


def _adapter(cfg: DictConfig, adapted: Adapted) -> str:
    if adapted.method is None:
        return "none: every weight trains"
    labels = {"r": "rank", "init_r": "rank", "lora_alpha": "alpha", "num_virtual_tokens": "tokens"}
    parts = [f"{label} {cfg.peft[key]}" for key, label in labels.items() if cfg.peft.get(key)]
    start = f", starts from {cfg.adapter}" if cfg.adapter is not None else ""
    return ", ".join([adapted.method, *parts]) + start


def _left_out(adapted: Adapted) -> Text:
    """Return the layers that cannot be adapted, by reason."""
    by_reason: dict[str, Counter[str]] = {}
    for name, reason in adapted.left_out.items():
        by_reason.setdefault(reason, Counter())[".".join(name.split(".")[-2:])] += 1
    texts = [
        f"{', '.join(f'{name} x{count}' for name, count in counts.items())}: {reason}"
        for reason, counts in by_reason.items()
    ]
    return Text("; ".join(texts), style="yellow")


def _rows(counts: Counts, suffix: str = "") -> Text:
    in_loss = f", {counts.trained_tokens:,} in the loss" if counts.trained_tokens else ""
    text = Text(f"{counts.rows:,} with {counts.tokens:,} tokens{in_loss}; ")
    text.append(f"{counts.truncated:,} truncated", style="yellow" if counts.truncated else "")
    text.append(", ")
    text.append(f"{counts.dropped:,} dropped", style="yellow" if counts.dropped else "")
    return text.append(suffix)


def _lengths(cfg: DictConfig, tokens: Tokens) -> Text:
    """Return the rows' lengths, and the `max_length` that would keep all, or 99%, of them whole."""
    lengths, truncated = tokens.lengths, tokens.counts.truncated
    if lengths is None:
        return Text()
    text = Text(f"median {lengths.median:,} tokens, longest {lengths.longest:,}")
    rows = tokens.counts.rows + tokens.counts.dropped
    if truncated and rows:
        # whether a few rows are much longer than the others
        has_outliers = lengths.most < lengths.longest // 2
        max_length = -(-(lengths.most if has_outliers else lengths.longest) // 8) * 8
        share, kept_share = f"{truncated / rows:.1%}", "99%" if has_outliers else "all"
        text.append(f"; {share} are truncated", style="yellow")
        text.append(f", algorithm.args.max_length={max_length} takes {kept_share} of them whole")
    return text


def unused(rows: Rows) -> list[str]:
    """Return the columns of the rows that training does not read."""
    columns = dict.fromkeys(name for row in rows.train[:100] for name in row)
    return [name for name in columns if name not in FIELDS]


def conclude(record: Record, objective: str, places: dict[str, str], saved: Path | None) -> None:
    """Print the metrics before and after training, and where everything was saved."""
    metrics: dict[str, Any] = record.values["metrics"]
    table = Table()
    for column in (str(record.values["name"]), "before", "after"):
        table.add_column(column, justify="right" if column in ("before", "after") else "left")
    for key in metrics:
        group, _, name = key.partition("/")
        if group == "eval":
            before, after = metrics.get(f"before/{name}"), metrics[key]
            percentages = ("exact_match", "accuracies", "accuracy")
            is_percentage = any(word in name for word in percentages)
            form = "{:.1%}".format if is_percentage else "{:.4f}".format
            label = f"eval {name}".replace("_", " ")
            table.add_row(label, form(before) if before is not None else "-", form(after))
    print_and_log(table)
    left = {"run": str(record.directory), **({saved.name: str(saved)} if saved else {})}
    lines = {
        "training loss": f"{metrics['train/loss']:.4f}  {curve(record.losses())}",
        "objective": f"{objective} {metrics[objective]:.4f}",
        "stopped early": _stopped(record),
        "evaluations": _best(record),
        "time": f"{metrics['train/seconds']:.1f} s training, {metrics['seconds']:.1f} s in all",
        "speed": _speed(metrics),
        "peak memory": size(int(metrics["peak_bytes"])),
        **(left if not is_scratch(record.directory) else {}),
        **places,
    }
    print_and_log(facts("", {key: value for key, value in lines.items() if value != "none"}))


def _best(record: Record) -> str:
    """Return which evaluation was the best, and the step of the saved weights."""
    best, saved = record.values.get("best"), record.values["saved_step"]
    if best is None:
        return "none"
    extreme = "highest" if best["goal"] == "maximize" else "lowest"
    text = f"{best['metric']} {extreme} at step {best['step']}: {best['value']:.4g}"
    if saved is None:
        return f"{text}; nothing is saved"
    text += f"; saved is step {saved}"
    if best["step"] == saved:
        return text
    if best["checkpoint"]:
        return f"{text} (the best lies in {best['checkpoint']}; keep=best saves it)"
    return f"{text} (keep=best saves the best)"


def _stopped(record: Record) -> str:
    """Return which rule ended the training before its last step, and why."""
    stopped = record.values.get("stopped")
    return f"{stopped['rule']}: {stopped['reason']}" if stopped else "none"


def _speed(metrics: dict[str, Any]) -> str:
    """Return steps and, if the trainer has logged them, tokens per second."""
    tokens = metrics["train/tokens_per_s"]
    steps = f"{metrics['train/steps_per_s']:.1f} steps/s"
    return f"{steps}, {tokens:,.0f} tokens/s" if tokens else steps
