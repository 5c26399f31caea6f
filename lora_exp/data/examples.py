"""What trainers learn from: rows as tokens, pairs, marked answers or prompts, and their counts."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pyarrow
from datasets import Dataset
from jinja2.exceptions import TemplateError
from omegaconf import DictConfig

from lora_exp.data.formats import SHAPES, Row
from lora_exp.data.rows import Rows
from lora_exp.data.template import render_chat
from lora_exp.data.tokens import IGNORED, Counts, Tokens, tokenise, virtual_tokens
from lora_exp.errors import ConfigError, DataError

Marked = tuple[str, list[int], list[int]]  # what it is, its ids, its labels


def prompt_ids(row: Row, tokenizer: Any) -> list[int]:
    """Return a prompt's tokens, of a chat with the answer's turn opened."""
    if isinstance(row["prompt"], str):
        ids: list[int] = tokenizer(row["prompt"])["input_ids"]
        return ids
    chat: list[int] = tokenizer.apply_chat_template(
        row["prompt"], tools=row.get("tools"), add_generation_prompt=True, return_dict=True
    )["input_ids"]
    return chat


def prepared(
    rows: Rows, tokenizer: Any, model: Any, cfg: DictConfig
) -> tuple[Tokens, Tokens | None]:
    """Prepare rows as the algorithm's trainer takes them: to train on, and held out.

    Args:
        rows: in the algorithm's shape.
        tokenizer: the base's; it gets the chat template of the rows, where they bring one.
        model: with its adapter, whose trained tokens stand before every prompt.
        cfg: the run's.

    Raises:
        ConfigError: `max_length` is longer than the model's context.
        DataError: rows that cannot be used.
    """
    args, shape = cfg.algorithm.args, cfg.algorithm.shape
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    if (args.get("max_length") or 0) > context:
        text = f"{args.max_length} is longer than the model's context of {context} tokens"
        raise ConfigError([("algorithm.args.max_length", text)])
    if rows.chat_template is not None:
        tokenizer.chat_template = rows.chat_template
    context -= virtual_tokens(model)
    splits = {"train": rows.train, "eval": rows.eval}
    if shape == "prompt":
        room = context - args.max_completion_length
        made = {what: prompts(some, tokenizer, room, what) for what, some in splits.items() if some}
    elif shape != "completion":
        made = {what: raw(some, shape, tokenizer) for what, some in splits.items() if some}
    else:
        cut = args.get("packing") and args.get("packing_strategy") in ("wrapped", "bfd_split")
        room = min(args.max_length or math.inf, context)
        options: dict[str, Any] = {
            "max_length": None if cut or room == math.inf else int(room),
            "completion_only": bool(args.get("completion_only_loss")),
            "separate": cfg.algorithm.task_type == "SEQ_2_SEQ_LM",
        }
        made = {
            what: tokenise(some, tokenizer, what=what, **options)
            for what, some in splits.items()
            if some
        }
    return made["train"], made.get("eval")


def recounted(
    train: Tokens, held_out: Tokens | None, trainer: Any, cfg: DictConfig
) -> tuple[Tokens, Tokens | None]:
    """Return the rows as the trainer holds them: some trainers tokenise for themselves."""
    if cfg.algorithm.shape in ("completion", "prompt"):
        return train, held_out
    length = cfg.algorithm.args.max_length
    train = seen(train, trainer.train_dataset, length, "train")
    return train, held_out and seen(held_out, trainer.eval_dataset, length, "eval")


def prompts(rows: list[Row], tokenizer: Any, room: float, what: str) -> Tokens:
    """Make prompt rows ready for trainers that answer them; the other columns stay for rewards.

    Args:
        rows: of shape `prompt`.
        tokenizer: its chat template in place.
        room: tokens that a prompt may have beside its answer; longer ones are dropped.
        what: `train` or `eval`, for messages.

    Raises:
        DataError: no prompt is left.
    """
    _check_template(rows, tokenizer)
    try:
        lengths = [len(prompt_ids(row, tokenizer)) for row in rows]
    except TemplateError as error:
        raise DataError(f"the chat template refuses a prompt: {error}") from error
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= room]
    if not kept:
        text = f"none of the {len(rows)} {what} prompts has at most {room:g} tokens"
        raise DataError(f"{text}; lower algorithm.args.max_completion_length or shorten them")
    tokens = sum(length for length in lengths if length <= room)
    counts = Counts(len(kept), tokens, 0, 0, len(rows) - len(kept))
    return Tokens(table(kept), counts, cached=False)


def table(rows: list[Row]) -> Dataset:
    """Return rows as a data set with the columns of all of them, None where a row has none.

    Raises:
        DataError: a column is of several types.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    for name, values in columns.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise DataError(f"field {name!r} is not of one type in all rows: {error}") from error
    return Dataset.from_dict(columns)


def _check_template(rows: list[Row], tokenizer: Any) -> None:
    chats = any(isinstance(row["prompt"], list) for row in rows)
    if chats and not tokenizer.chat_template:
        text = (
            "the rows are chats, but the tokenizer has no chat template; give data.chat_template="
        )
        raise DataError(f"{text}<file.jinja>, or rows of plain text")
    asked = next((row["prompt"] for row in rows if isinstance(row["prompt"], list)), None)
    if asked is not None:  # trainers render rows themselves, and would wait for ever
        with suppress(TemplateError):  # said with the row, later
            render_chat(asked, tokenizer)


def raw(rows: list[Row], shape: str, tokenizer: Any) -> Tokens:
    """Hand rows to a trainer that tokenises them itself; `seen` counts when it has.

    Raises:
        DataError: chats without a template, or a column of several types.
    """
    _check_template(rows, tokenizer)
    wanted = SHAPES[shape] | {"tools", "margin"}
    columns = [{key: row[key] for key in row.keys() & wanted} for row in rows]
    return Tokens(table(columns), Counts(len(rows), 0, 0, 0, 0), cached=False)


def seen(given: Tokens, dataset: Any, max_length: int | None, what: str) -> Tokens:
    """Count what a trainer made of the rows that it was given.

    Raises:
        DataError: it has dropped all of them.
    """
    limit = max_length or float("inf")
    total = trained = truncated = 0
    for row in dataset:
        prompt = len(row.get("prompt_ids", ()))
        answers = [len(row[key]) for key in ANSWERS if key in row]
        truncated += any(prompt + answer > limit for answer in answers)
        total += sum(int(min(prompt + answer, limit)) for answer in answers)
        # without a prompt of its own a row is a text that gets one score
        trained += sum(
            int(max(0, min(answer, limit - prompt))) if "prompt_ids" in row else 1
            for answer in answers
        )
    counts = Counts(len(dataset), total, trained, truncated, given.counts.rows - len(dataset))
    if not len(dataset):
        text = f"each of the {given.counts.rows} {what} rows is longer than {max_length} tokens"
        raise DataError(f"{text}; raise algorithm.args.max_length or shorten them")
    return Tokens(dataset, counts, cached=False)


ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")


def first(tokens: Tokens, tokenizer: Any) -> list[Marked]:
    """Return the first row's texts as tokens and labels, each with what it is."""
    row = tokens.dataset[0]
    if "input_ids" in row:
        ids, labels = row["input_ids"], row["labels"]
        if all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=False)):
            return [("", ids, labels)]
        return [("prompt", ids, [IGNORED] * len(ids)), ("answer", labels, labels)]
    found: list[Marked] = []
    for key in (key for key in ANSWERS if key in row):
        name, prompt = key.removesuffix("_ids"), row.get("prompt_ids", [])
        if "label" in row:
            name = "wanted" if row["label"] else "unwanted"
        ids = prompt + row[key]
        labels = [IGNORED] * len(prompt) + row[key]
        if "prompt_ids" not in row:  # the score is read at the last token
            labels = [IGNORED] * (len(ids) - 1) + ids[-1:]
        found.append((name, ids, labels))
    if not found:
        ids = prompt_ids(row, tokenizer)
        found.append(("prompt; the answer is the model's own", ids, [IGNORED] * len(ids)))
    return found
