"""Rows: read from files and the hub, checked, brought to their shapes, and split.

Knows nothing of tokens; needs no torch.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lora_exp.data import tasks as generated
from lora_exp.data.formats import EmptyAnswer, detect, read_as
from lora_exp.data.reading import OnError, files, lines
from lora_exp.data.shapes import Placed, reshape, several
from lora_exp.data.shapes import where as place_of
from lora_exp.data.turns import FieldError, Row
from lora_exp.errors import DataError
from lora_exp.files.paths import asset
from lora_exp.files.whole import sha256

Format = Literal[
    "auto", "preference", "unpaired_preference", "messages", "sharegpt", "alpaca",
    "prompt_completion", "text", "prompt",
]  # fmt: skip
Columns = Mapping[str, str] | None
SPLIT_SEED = 0  # the split belongs to the data, not to the run's seed
DRAWN = "lora_exp.corpus"  # the source's name in records; a run resumes with the same one


@dataclass(frozen=True)
class Rows:
    """A data set in memory, and where it came from."""

    train: list[Row]
    eval: list[Row]
    format: str
    source: dict[str, str]  # file -> SHA-256, or hub id -> revision
    chat_template: str | None  # Jinja text that replaces the model's own
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # rows that were left out, and why
    on_error: OnError = "raise"  # of rows that only the chat template can judge

    def shaped(self, shape: str) -> Rows:
        """Return the rows in the shape that an algorithm learns from.

        Raises:
            DataError: they do not hold what it needs.
        """
        train, held_out = (reshape(rows, self.format, shape) for rows in (self.train, self.eval))
        return replace(self, train=train, eval=held_out)

    def without(self, refused: dict[str, str]) -> Rows:
        """Leave out rows that a chat template refuses.

        Args:
            refused: where a row was read -> why it is left out.
        """
        kept = [
            [row for row in rows if place_of(row) not in refused]
            for rows in (self.train, self.eval)
        ]
        skipped = (*self.skipped, *refused.values())
        return replace(self, train=kept[0], eval=kept[1], skipped=skipped)


@dataclass(frozen=True)
class Converted:
    """Rows in their shape, and those that were left out."""

    rows: list[Row]
    format: str
    skipped: list[str]
    empty: int  # of the skipped, those without an answer


def jsonl(
    path: str,
    *,
    eval_path: str | None,
    eval_share: float,
    format: Format,
    max_rows: int | None,
    max_eval_rows: int | None,
    chat_template: str | None,
    on_error: OnError,
    columns: Columns = None,
    as_chat: bool = False,
) -> Rows:
    """Read rows from a file or a glob; see `reading` for the kinds of files.

    Raises:
        DataError: by file, line and field, what cannot be used; or nothing is left to train on.
    """
    read, source = _read_files(path, format, on_error, columns, as_chat)
    held_out = None
    if eval_path is not None:
        held_out, eval_source = _read_files(eval_path, format, on_error, columns, as_chat)
        source |= eval_source
    split = _split(read, held_out, eval_share, max_rows, max_eval_rows)
    return _rows(read, held_out, split, source, chat_template, on_error)


def hub(
    path: str,
    *,
    subset: str | None,
    revision: str | None,
    split: str,
    eval_split: str | None,
    eval_share: float,
    format: Format,
    max_rows: int | None,
    max_eval_rows: int | None,
    chat_template: str | None,
    on_error: OnError,
    columns: Columns = None,
    as_chat: bool = False,
) -> Rows:
    """Load a data set from the Hugging Face hub, or a folder that `datasets` can read.

    Raises:
        DataError: it cannot be loaded, or by row and field, what cannot be used.
    """
    from datasets import load_dataset

    def load(name: str) -> Converted:
        try:
            loaded = load_dataset(path, subset, revision=revision, split=name)
        except (OSError, ValueError) as error:
            raise DataError(f"data.path: {path} ({name}) cannot be loaded: {error}") from error
        numbered = ((f"{path}[{name}] row {i}", row) for i, row in enumerate(loaded))
        return convert(numbered, format, f"{path}[{name}]", on_error, columns, as_chat)

    read = load(split)
    held_out = load(eval_split) if eval_split else None
    parts = _split(read, held_out, eval_share, max_rows, max_eval_rows)
    if Path(path).exists():
        paths = sorted(p for p in Path(path).rglob("*") if p.is_file())
        source = {str(p): sha256(p) for p in paths}
        return _rows(read, held_out, parts, source, chat_template, on_error)
    commit = _commit(path, revision)
    rows = _rows(read, held_out, parts, {path: str(commit)}, chat_template, on_error)
    if revision == commit:
        return rows
    unpinned = f"data.revision: {path} is not pinned to a commit; this run saw {commit}"
    return replace(rows, warnings=(unpinned, *rows.warnings))


def _rows(
    read: Converted,
    held_out: Converted | None,
    split: tuple[list[Row], list[Row]],
    source: dict[str, str],
    chat_template: str | None,
    on_error: OnError,
) -> Rows:
    """Put together what was read, with what is worth a warning."""
    both = [read, held_out] if held_out else [read]
    skipped = tuple(why for part in both for why in part.skipped)
    train, evaluation = split
    warnings = []
    if empty := sum(part.empty for part in both):
        warnings.append(f"{empty:,} rows have an empty answer and are left out")
    texts = [row["prompt"] for row in train if isinstance(row.get("prompt"), str)]
    if spaces := sum(text[-1:].isspace() for text in texts):
        text = f"{spaces:,} of {len(texts):,} prompts end in white space, which most tokenizers"
        warnings.append(f"{text} join with the answer's first word; end prompts without it")
    if repeated := _repeated(train, evaluation):
        warnings.append(f"{repeated:,} of {len(evaluation):,} held-out rows are training rows, too")
    return Rows(
        train, evaluation, read.format, source, _template(chat_template), tuple(warnings),
        skipped, on_error,
    )  # fmt: skip


def _repeated(train: list[Row], held_out: list[Row]) -> int:
    """Count the held-out rows that stand among the training rows."""
    if not held_out:
        return 0
    known = {_content(row) for row in train}
    return sum(_content(row) in known for row in held_out)


def _content(row: Row) -> int:
    return hash(json.dumps(row, sort_keys=True, default=str))


def _commit(path: str, revision: str | None) -> str:
    """Ask the hub which commit a revision is; rows from the cache do without an answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        return str(HfApi().dataset_info(path, revision=revision).sha)
    except (OSError, HTTPError):
        return revision or "an unknown commit (the hub did not answer)"


def corpus(seed: int, rows: int, eval_rows: int, chat_template: str | None) -> Rows:
    """Draw the embedded model's text from a seed."""
    tasks = generated.CORPUS
    train = generated.take(tasks, seed, rows, held_out=False)
    held_out = generated.take(tasks, seed, eval_rows, held_out=True)
    source = {DRAWN: f"seed {seed}, {rows} rows"}
    return Rows(train, held_out, "messages", source, _template(chat_template))


def pairs(seed: int, rows: int, eval_rows: int, chat_template: str | None) -> Rows:
    """Draw questions with a right and a wrong answer from a seed; see `tasks.pairs`."""
    train = generated.pairs(seed, rows, held_out=False)
    held_out = generated.pairs(seed, eval_rows, held_out=True)
    source = {DRAWN: f"pairs, seed {seed}, {rows} rows"}
    return Rows(train, held_out, "preference", source, _template(chat_template))


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    if not asset(path).is_file():
        raise DataError(f"data.chat_template: no such file: {path}")
    return asset(path).read_text(encoding="utf-8")


def _read_files(
    pattern: str, format: str, on_error: OnError, columns: Columns, as_chat: bool
) -> tuple[Converted, dict[str, str]]:
    paths = files(pattern)
    source = {}
    for path in paths:
        name = pattern if len(paths) == 1 else str(path)
        source[name] = sha256(path)
    numbered = (row for path in paths for row in lines(path))
    return convert(numbered, format, pattern, on_error, columns, as_chat), source


def convert(
    rows: Iterable[tuple[str, Any]],
    format: str,
    source: str,
    on_error: OnError,
    columns: Columns = None,
    as_chat: bool = False,
) -> Converted:
    """Bring every row to its shape; the first row decides the format where it is `auto`.

    A row whose answer is empty is left out, whatever `on_error` says.

    Args:
        rows: each with where it was read.
        format: of all of them.
        source: what they were read from, for errors.
        on_error: of a row that cannot be used.
        columns: field -> the column that holds it.
        as_chat: plain texts of prompts and answers become turns.

    Raises:
        DataError: by file, line and field, what cannot be used; or there are no rows.
    """
    converted: list[Row] = []
    skipped: list[str] = []
    faults: list[str] = []
    empty = 0
    for where, row in rows:
        try:
            if format == "auto":
                format = detect(_named(checked(row, where), columns, where), where)
            converted.append(_converted(row, format, columns, as_chat, where))
        except EmptyAnswer as error:
            empty += 1
            skipped.append(f"{where}: {error}")
        except DataError as error:
            (faults if on_error == "raise" else skipped).append(str(error))
            if format == "auto":  # no row can be read without one
                break
    if faults:
        raise DataError(several(faults))
    if not converted:
        why = f"; {len(skipped)} were skipped, the first: {skipped[0]}" if skipped else ""
        raise DataError(f"{source}: no rows{why}")
    return Converted(converted, format, skipped, empty)


def _converted(row: Any, format: str, columns: Columns, as_chat: bool, where: str) -> Row:
    row = _named(checked(row, where), columns, where)
    try:
        return Placed(read_as(format, row, as_chat), where)
    except EmptyAnswer:
        raise
    except FieldError as error:
        raise DataError(f"{where}: {error} (read as {format})") from None


def checked(row: Any, where: str) -> Row:
    """Return a row that is an object of texts that can be written as UTF-8.

    Raises:
        DataError: it is not, or could not be read.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is an object {{...}}, this is {type(row).__name__}")
    for field, value in row.items():
        try:
            json.dumps([field, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            text = f"field {field!r} holds half a surrogate pair, which is no text"
            raise DataError(f"{where}: {text}") from None
    return row


def _named(row: Row, columns: Columns, where: str) -> Row:
    """Give columns the names of the fields that they hold."""
    if not columns:
        return row
    missing = sorted(set(columns.values()) - row.keys())
    if missing:
        text = f"data.columns: there is no column {missing[0]!r}; the columns are {sorted(row)}"
        raise DataError(f"{where}: {text}")
    rest = {key: row[key] for key in row.keys() - set(columns.values())}
    return rest | {field: row[column] for field, column in columns.items()}


def _split(
    read: Converted,
    evaluation: Converted | None,
    share: float,
    max_rows: int | None,
    max_eval_rows: int | None,
) -> tuple[list[Row], list[Row]]:
    """Hold out a share of the rows where no evaluation rows were given, then apply the limits."""
    train = read.rows
    if evaluation is not None:
        held_out = evaluation.rows
    else:
        count = min(round(len(train) * share), len(train) - 1)
        count = max(count, 1) if share and len(train) > 1 else count
        chosen = set(random.Random(SPLIT_SEED).sample(range(len(train)), count))
        held_out = [row for i, row in enumerate(train) if i in chosen]
        train = [row for i, row in enumerate(train) if i not in chosen]
    return train[:max_rows], held_out[:max_eval_rows]
