"""Evaluation of a saved model and its base on held-out rows: loss, answers, preferences.

The loss counts the same tokens as in training (`lora_exp.data.encoding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lora_exp.after.loading import Loaded, check_apart, load, load_base
from lora_exp.after.output import check_file
from lora_exp.after.saved import Saved, find
from lora_exp.config.door import build
from lora_exp.data.encoding import IGNORED
from lora_exp.data.formats import uncounted
from lora_exp.data.reading import files, lines
from lora_exp.data.rendered import prompt_of
from lora_exp.data.rows import Rows, jsonl
from lora_exp.data.tokens import tokenise
from lora_exp.data.turns import Row
from lora_exp.errors import DataError, ExtraError, SavedError
from lora_exp.files.strict import dumps
from lora_exp.files.whole import write_whole
from lora_exp.record.console import tracked
from lora_exp.record.progress import quiet
from lora_exp.training.answers import Answer, answer, exact_match_rates, room
from lora_exp.training.measure import encoded

Measure = Callable[[str], dict[str, float]]


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows: their tokens and labels, and the rows that also have a prompt."""

    ids: list[list[int]]
    labels: list[list[int]]
    truncated: int  # rows cut to the model's context
    with_prompt: list[Row]


def evaluate(
    path: str | Path,
    data: str | Path | None = None,
    base: str | None = None,
    quant: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    out: str | Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Measure an adapter and its base alone, or a whole model, on rows with known answers.

    Args:
        path: a run, an adapter or a whole model; a reward model is measured on pairs.
        data: JSON Lines, or a glob, of any format that training takes; None: the held-out rows
            of its run.
        base: the location of the base, if not the one that the adapter names.
        quant: how to quantise the base; None: as in its run.
        max_new_tokens: of each greedy answer.
        batch_size: rows at a time.
        out: a JSON file to write the report to.
        force: replace `out` if it is there.

    Returns:
        What was measured, and `results`: of `base` and `adapter`, or of `model`, the metrics
        `loss` in nats a token, `perplexity`, `exact_match` (by `task` too), `rouge_l` (0 to 1) and
        `bleu` (0 to 100); of a reward model `accuracy` and `margin`.

    Raises:
        ExtraError: the extra `eval` is not installed.
        SavedError: there is nothing to measure, or `out` is taken.
        DataError: rows cannot be used, or none has a known answer.
    """
    if missing := [name for name in ("rouge_score", "sacrebleu") if find_spec(name) is None]:
        raise ExtraError(f'{" and ".join(missing)} missing: pip install "lora-exp[eval]"')
    quiet()
    if out is not None:
        check_file(Path(out).expanduser(), force, str(data or ""))
    saved = find(path)
    rows = _held_out(saved) if data is None else _read(str(data), saved)
    report = _report(saved, rows, base, quant, max_new_tokens, batch_size)
    if out is not None:
        write_whole(Path(out).expanduser(), dumps(report, indent=1) + "\n")
    return report


def _report(
    saved: Saved,
    rows: Rows,
    base: str | None,
    quant: str | None,
    max_new_tokens: int,
    batch_size: int,
) -> dict[str, Any]:
    """Load the model, and measure it on the rows; see `evaluate`."""
    check_apart(saved)
    is_reward = saved.task_type == "SEQ_CLS"
    if is_reward:
        rows = rows.shaped("preference")
    loaded = load(saved, load_base(saved, base, quant), apart=True)
    counts: dict[str, Any]
    answers = partial(_answer_measure, completion_only=saved.completion_only)
    counts, measure = (_preference_measure if is_reward else answers)(
        loaded, rows, max_new_tokens, batch_size
    )
    results = {}
    with loaded.answering():
        if saved.adapter is not None and not is_reward:  # the base alone has no trained head
            with loaded.model.disable_adapter():
                results["base"] = measure("of the base")
        name = "model" if saved.adapter is None else "adapter"
        results[name] = measure(f"of the {name}")
    return {
        "path": str(saved.folder),
        "base": saved.base,
        "quant": quant or saved.quant,
        "data": rows.source,
        **counts,
        "max_new_tokens": max_new_tokens,
        "results": results,
    }


def _read(data: str, saved: Saved) -> Rows:
    """Read rows; texts become chats, and columns fields, if they did in the adapter's run."""
    first: Any = next((row for file in files(data) for _, row in lines(file)), None)
    return jsonl(
        data, eval_path=None, eval_share=0.0, format=saved.format(first), max_rows=None,
        max_eval_rows=None, columns=saved.columns(first), chat_template=None, on_error="raise",
        as_chat=saved.as_chat,
    )  # fmt: skip


def _held_out(saved: Saved) -> Rows:
    """Return the held-out rows of a run, as the rows to measure on.

    Raises:
        SavedError: its run is missing, had no held-out rows, or its rows have changed.
    """
    if not saved.settings:
        raise SavedError(f"{saved.folder} has no run beside it; give rows with --data")
    # the config may come from anybody, so its trusted_targets do not count
    cfg = OmegaConf.create(saved.settings | {"trusted_targets": []})
    rows: Rows = build(cfg, "data")
    if not rows.eval:
        raise SavedError(f"{saved.run} has no held-out rows; give rows with --data")
    recorded = saved.record.get("data") or {}
    if changed := [name for name, now in rows.source.items() if recorded.get(name, now) != now]:
        text = f"{', '.join(changed)} changed since {saved.run} was trained"
        raise SavedError(f"{text}; give rows with --data")
    return replace(rows, train=rows.eval, eval=[])


def _answer_measure(
    loaded: Loaded, rows: Rows, max_new_tokens: int, batch_size: int, completion_only: bool
) -> tuple[dict[str, int], Measure]:
    """Return the numbers of rows and tokens, and a function that measures on them."""
    held_out = _tokenised(loaded, rows.train, completion_only)
    first = 0 if loaded.model.config.is_encoder_decoder else 1  # nothing predicts the first token
    settings = SimpleNamespace(rows=None, max_new_tokens=max_new_tokens, batch_size=batch_size)
    counts = {
        "rows": len(rows.train),
        "with_loss": len(held_out.ids),
        "with_answer": len(held_out.with_prompt),
        "truncated": held_out.truncated,
        "tokens": sum(label != IGNORED for row in held_out.labels for label in row[first:]),
    }

    def measure(what: str) -> dict[str, float]:
        loss = _loss(loaded, held_out, batch_size, what)
        if not math.isfinite(loss):
            raise SavedError(f"the loss {what} is {loss}: lora-exp check or inspect shows why")
        metrics = {"loss": loss, "perplexity": math.exp(loss)}
        if not held_out.with_prompt:
            return metrics
        answers = answer(loaded.model, loaded.tokenizer, held_out.with_prompt, settings, what)
        return metrics | exact_match_rates(answers) | _overlap(answers)

    return counts, measure


def _tokenised(loaded: Loaded, rows: Sequence[Row], completion_only: bool) -> HeldOut:
    known = [(row, shaped) for row in rows if (shaped := _training_row(row)) is not None]
    if not known:
        text = "no row has a known answer (completion, chosen, answer, turns that end with one)"
        raise DataError(f"{text}, and none is plain text")
    tokens = tokenise(
        [shaped for _, shaped in known],
        loaded.tokenizer,
        max_length=room(loaded.model, 0),
        completion_only=completion_only,
        separate=bool(loaded.model.config.is_encoder_decoder),
        what="eval",
    )
    with_prompt = [row for row, _ in known if prompt_of(row, loaded.tokenizer) is not None]
    ids, labels = list(tokens.dataset["input_ids"]), list(tokens.dataset["labels"])
    return HeldOut(ids, labels, tokens.counts.truncated, with_prompt)


def _training_row(row: Row) -> Row | None:
    """Return a row with its known answer in the shape that training takes; None if it has none."""
    if "messages" in row or "text" in row:
        return row
    known = row.get("chosen", row.get("completion", row.get("answer")))
    if not isinstance(known, str | list) or row.get("label") is False:
        return None
    if isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "completion": known}
    turns = [{"role": "assistant", "content": known}] if isinstance(known, str) else known
    return {"messages": uncounted(row["prompt"]) + turns, "tools": row.get("tools")}


def _loss(loaded: Loaded, held_out: HeldOut, batch_size: int, what: str) -> float:
    """Return the mean of -ln p over all tokens that count, each with the same weight."""
    order = sorted(range(len(held_out.ids)), key=lambda i: len(held_out.ids[i]))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    total, count = 0.0, 0
    for group in tracked(groups, f"loss {what}"):
        labels_BT = _padded([held_out.labels[i] for i in group], IGNORED, loaded)
        logits_BTV, targets_BT = _predicted(loaded, [held_out.ids[i] for i in group], labels_BT)
        for logits_TV, targets_T in zip(logits_BTV, targets_BT, strict=True):
            row_loss = cross_entropy(
                logits_TV.float(), targets_T, ignore_index=IGNORED, reduction="sum"
            )
            total += float(row_loss)
        count += int((targets_BT != IGNORED).sum())
    return total / count


def _predicted(loaded: Loaded, ids: list[list[int]], labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, and at each position the label that they predict."""
    inputs = _inputs(loaded, ids)
    if loaded.model.config.is_encoder_decoder:
        return loaded.model(**inputs, labels=labels_BT).logits, labels_BT
    logits = loaded.model(**inputs, use_cache=False).logits
    logits = logits[:, -labels_BT.shape[1] :]  # without those of virtual tokens
    return logits[:, :-1], labels_BT[:, 1:]


def _inputs(loaded: Loaded, ids: list[list[int]]) -> dict[str, Tensor]:
    mask = [[1] * len(row) for row in ids]
    return {
        "input_ids": _padded(ids, loaded.tokenizer.pad_token_id, loaded),
        "attention_mask": _padded(mask, 0, loaded),
    }


def _padded(rows: list[list[int]], value: int, loaded: Loaded) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    padded: Tensor = pad_sequence(tensors, batch_first=True, padding_value=value)
    return padded.to(loaded.model.device)


def _overlap(answers: list[Answer]) -> dict[str, float]:
    """Return the mean ROUGE-L F-measure, 0 to 1, and the corpus BLEU, 0 to 100."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    from sacrebleu import corpus_bleu

    expected = [answer.expected or "" for answer in answers]
    actual = [answer.text for answer in answers]
    scorer = RougeScorer(["rougeL"])
    pairs = zip(expected, actual, strict=True)
    rouge = fmean(scorer.score(*pair)["rougeL"].fmeasure for pair in pairs)
    return {"rouge_l": rouge, "bleu": corpus_bleu(actual, [expected]).score}


def _preference_measure(
    loaded: Loaded, rows: Rows, _: int, batch_size: int
) -> tuple[dict[str, int], Measure]:
    """Return the number of pairs, and a function that measures a reward model on them."""
    pairs = rows.train
    groups = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]

    def scores(group: Sequence[Row], key: str) -> Tensor:
        ids = [encoded(row, key, loaded.tokenizer)[0] for row in group]
        scores_B: Tensor = loaded.model(**_inputs(loaded, ids)).logits[:, 0].float()
        return scores_B

    def measure(what: str) -> dict[str, float]:
        margins: list[float] = []
        for group in tracked(groups, f"scores {what}"):
            margins += (scores(group, "chosen") - scores(group, "rejected")).tolist()
        return {"accuracy": fmean(m > 0 for m in margins), "margin": fmean(margins)}

    return {"rows": len(pairs)}, measure
