"""What trainers learn from: tokens, pairs, labelled answers or prompts, and their counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow
from datasets import Dataset, Features, Json, List
from datasets.features.features import generate_from_arrow_type
from omegaconf import DictConfig

from lora_exp.data.encoding import IGNORED, text_prompt, without_bos
from lora_exp.data.reading import OnError
from lora_exp.data.rendered import ended
from lora_exp.data.rows import Rows
from lora_exp.data.shapes import SHAPES, list_faults, location_of
from lora_exp.data.template import render_chat, to_form, turn_end
from lora_exp.data.tokens import Counts, Lengths, Tokens, tokenise, virtual_tokens
from lora_exp.data.turns import Row
from lora_exp.errors import ConfigError, DataError

LabelledText = tuple[str, list[int], list[int]]  # name, token ids, labels


def prompt_ids(row: Row, tokenizer: Any) -> list[int]:
    """Return a prompt's tokens; those of a chat end where the answer begins."""
    if isinstance(row["prompt"], str):
        return text_prompt(row["prompt"], tokenizer)
    text = render_chat(row["prompt"], tokenizer, row.get("tools"), answer=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def prepared(
    rows: Rows, tokenizer: Any, model: Any, cfg: DictConfig
) -> tuple[Tokens, Tokens | None]:
    """Prepare training and held-out rows as the algorithm's trainer takes them.

    Args:
        rows: in the algorithm's shape.
        tokenizer: the base's, with its chat template.
        model: with its adapter; trained prompt tokens of the adapter reduce the context.
        cfg: the run's config.

    Raises:
        ConfigError: `max_length` is longer than the model's context.
        DataError: some rows cannot be used.
    """
    args, shape = cfg.algorithm.args, cfg.algorithm.shape
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    if (args.get("max_length") or 0) > context:
        text = f"{args.max_length} is longer than the model's context of {context} tokens"
        raise ConfigError([("algorithm.args.max_length", text)])
    context -= virtual_tokens(model)
    splits = {"train": rows.train, "eval": rows.eval}
    if shape == "prompt":
        room = context - args.max_completion_length
        tokens = {
            what: prompts(rows_of_split, tokenizer, room, what, rows.on_error)
            for what, rows_of_split in splits.items()
            if rows_of_split
        }
    elif shape != "completion":
        tokens = {
            what: raw(rows_of_split, shape, tokenizer, rows.on_error)
            for what, rows_of_split in splits.items()
            if rows_of_split
        }
    else:
        options = _token_options(cfg, context)
        options |= {"on_error": rows.on_error, "num_proc": rows.num_proc}
        tokens = {
            what: tokenise(rows_of_split, tokenizer, what=what, **options)
            for what, rows_of_split in splits.items()
            if rows_of_split
        }
    return tokens["train"], tokens.get("eval")


def _token_options(cfg: DictConfig, context: float) -> dict[str, Any]:
    """Return the options of `tokenise` for rows with a completion."""
    args = cfg.algorithm.args
    strategies = ("wrapped", "bfd_split")  # these split long rows instead of cutting them
    is_split = args.get("packing") and args.get("packing_strategy") in strategies
    room = min(args.max_length or math.inf, context)
    return {
        "max_length": None if is_split or room == math.inf else int(room),
        "completion_only": bool(args.get("completion_only_loss")),
        "separate": cfg.algorithm.task_type == "SEQ_2_SEQ_LM",
    }


def unending(rows: Rows, tokenizer: Any) -> str | None:
    """Return a warning if the chat template ends answers with no special token."""
    chats = any(isinstance(row.get("messages", row.get("prompt")), list) for row in rows.train[:1])
    if not chats or turn_end(tokenizer) is not None:
        return None
    text = "the chat template ends answers with no special token, so the model does not learn to"
    return f"{text} stop; give data.chat_template=<file.jinja> with one"


def recounted(
    train: Tokens, held_out: Tokens | None, trainer: Any, cfg: DictConfig
) -> tuple[Tokens, Tokens | None]:
    """Return the rows with the trainer's counts, if the trainer has tokenised them itself."""
    if cfg.algorithm.shape in ("completion", "prompt"):
        return train, held_out
    length = cfg.algorithm.args.max_length
    train = recount(train, trainer.train_dataset, length, "train")
    return train, held_out and recount(held_out, trainer.eval_dataset, length, "eval")


def prompts(
    rows: Sequence[Row], tokenizer: Any, room: float, what: str, on_error: OnError = "raise"
) -> Tokens:
    """Prepare prompt rows for trainers that answer them; other columns are kept for rewards.

    Args:
        rows: of shape `prompt`.
        tokenizer: with its chat template.
        room: the most tokens of a prompt; longer prompts are dropped.
        what: `train` or `eval`, for messages.
        on_error: what to do with prompts that the chat template refuses.

    Raises:
        DataError: no prompt is left, or the chat template refuses one (file and line are named).
    """
    lengths: dict[int, int] = {}  # by the row's index

    def measure(row: Row, number: int) -> None:
        lengths[number] = len(prompt_ids(row, tokenizer))

    refused = _refused_rows(rows, tokenizer, measure, on_error)
    kept = [i for i, length in lengths.items() if length <= room]
    if not kept:
        text = f"none of the {len(rows)} {what} prompts has at most {room:g} tokens"
        raise DataError(f"{text}; lower algorithm.args.max_completion_length or shorten them")
    counts = Counts(len(kept), sum(lengths[i] for i in kept), 0, 0, len(lengths) - len(kept))
    prepared_rows = [_as_trained(rows[i], tokenizer) for i in kept]
    return Tokens(table(prepared_rows), counts, cached=False, refused=refused)


def raw(rows: Sequence[Row], shape: str, tokenizer: Any, on_error: OnError = "raise") -> Tokens:
    """Prepare rows for a trainer that tokenises them itself; `recount` then counts their tokens.

    Raises:
        DataError: chats without a template, or the template refuses one (file and line are named).
    """
    answers = [field for field in ("chosen", "rejected", "completion") if field in SHAPES[shape]]

    def render(row: Row, number: int) -> None:
        if isinstance(row["prompt"], list):
            for answer in answers:
                render_chat(row["prompt"] + row[answer], tokenizer, row.get("tools"))

    refused = _refused_rows(rows, tokenizer, render, on_error)
    fields = SHAPES[shape] | {"tools", "margin"}
    kept = [row for row in rows if location_of(row) not in refused]
    prepared_rows = [_as_trained(row, tokenizer) for row in kept]
    columns = [{key: row[key] for key in row.keys() & fields} for row in prepared_rows]
    return Tokens(table(columns), Counts(len(kept), 0, 0, 0, 0), cached=False, refused=refused)


def _refused_rows(
    rows: Sequence[Row], tokenizer: Any, check: Callable[[Row, int], None], on_error: OnError
) -> dict[str, str]:
    """Return the rows that the chat template refuses: where each was read -> why."""
    if any(isinstance(row["prompt"], list) for row in rows) and not tokenizer.chat_template:
        text = "the rows are chats, but the tokenizer has no chat template; give"
        raise DataError(f"{text} data.chat_template=chatml or a file.jinja, or rows of plain text")
    refused = {}
    for number, row in enumerate(rows):
        try:
            check(row, number)
        except DataError as error:
            refused[location_of(row)] = f"{location_of(row)}: {error}"
    if refused and (on_error == "raise" or len(refused) == len(rows)):
        raise DataError(list_faults(list(refused.values())))
    return refused


def _as_trained(row: Row, tokenizer: Any) -> Row:
    """Return a row as trainers take it, which add BOS and EOS tokens to texts themselves."""
    parts = {key: row[key] for key in TEXTS if key in row}
    for key, part in parts.items():
        if isinstance(part, list):
            parts[key] = to_form(part, tokenizer)
        elif isinstance(part, str):
            is_prompt = key == "prompt"
            parts[key] = without_bos(part, tokenizer) if is_prompt else ended(part, tokenizer)
    return dict(row) | parts


TEXTS = ("prompt", "chosen", "rejected", "completion")


def table(rows: Sequence[Row]) -> Dataset:
    """Return rows as a data set with the columns of all of them, None where a row has none.

    Columns of objects, or of several types, are stored as JSON: Arrow would give each object the
    keys of all others.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    features = {name: _feature(values) for name, values in columns.items()}
    return Dataset.from_dict(columns, features=Features(features))


def _feature(values: list[Any]) -> Any:
    """Return the type of a column."""
    try:
        column_type = pyarrow.array(values).type
    except (pyarrow.ArrowException, OverflowError):
        return Json()
    if pyarrow.types.is_nested(column_type):
        lists = all(isinstance(value, list) for value in values)
        return List(Json()) if lists and pyarrow.types.is_struct(column_type.value_type) else Json()
    return generate_from_arrow_type(column_type)


def recount(tokens: Tokens, dataset: Any, max_length: int | None, what: str) -> Tokens:
    """Count a trainer's tokenised rows, and the rows that it has dropped.

    Args:
        tokens: the rows that the trainer was given.
        dataset: its tokenised rows.
        max_length: tokens to which it cuts a row; None: it cuts none.
        what: `train` or `eval`, for messages.

    Raises:
        DataError: it has dropped all rows.
    """
    limit = max_length or float("inf")
    total = trained = truncated = 0
    lengths: list[int] = []
    for row in dataset:
        prompt = len(row.get("prompt_ids", ()))
        answers = [len(row[key]) for key in ANSWERS if key in row]
        lengths.append(prompt + max(answers, default=0))
        truncated += any(prompt + answer > limit for answer in answers)
        total += sum(int(min(prompt + answer, limit)) for answer in answers)
        # a row without prompt_ids is a text with one score, at its last token
        trained += sum(
            int(max(0, min(answer, limit - prompt))) if "prompt_ids" in row else 1
            for answer in answers
        )
    counts = Counts(len(dataset), total, trained, truncated, tokens.counts.rows - len(dataset))
    if not len(dataset):
        text = f"each of the {tokens.counts.rows} {what} rows is longer than {max_length} tokens"
        raise DataError(f"{text}; raise algorithm.args.max_length or shorten them")
    return Tokens(dataset, counts, cached=False, lengths=Lengths.of(lengths))


ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")


def first(tokens: Tokens, tokenizer: Any) -> list[LabelledText]:
    """Return the first row's texts, each with its name, token ids and labels."""
    row = tokens.dataset[0]
    if "input_ids" in row:
        ids, labels = row["input_ids"], row["labels"]
        if all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=False)):
            return [("", ids, labels)]
        return [("prompt", ids, [IGNORED] * len(ids)), ("answer", labels, labels)]
    texts: list[LabelledText] = []
    for key in (key for key in ANSWERS if key in row):
        name, prompt = key.removesuffix("_ids"), row.get("prompt_ids", [])
        if "label" in row:
            name = "wanted" if row["label"] else "unwanted"
        ids = prompt + row[key]
        labels = [IGNORED] * len(prompt) + row[key]
        if "prompt_ids" not in row:  # the score is read at the last token
            labels = [IGNORED] * (len(ids) - 1) + ids[-1:]
        texts.append((name, ids, labels))
    if not texts:
        ids = prompt_ids(row, tokenizer)
        texts.append(("prompt; the answer is the model's own", ids, [IGNORED] * len(ids)))
    return texts
