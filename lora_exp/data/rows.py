"""Rows: read from files and the hub, checked, brought to their shapes, and split.

Knows nothing of tokens; needs no torch.
"""

from __future__ import annotations

import glob
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lora_exp.data import tasks as generated
from lora_exp.data.formats import FORMATS, FieldError, Row, detect, reshape
from lora_exp.errors import DataError
from lora_exp.files.paths import asset
from lora_exp.files.whole import sha256

Format = Literal[
    "auto", "preference", "unpaired_preference", "messages", "sharegpt", "alpaca",
    "prompt_completion", "text", "prompt",
]  # fmt: skip
OnError = Literal["raise", "skip"]
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
    warning: str | None = None
    skipped: tuple[str, ...] = ()  # rows that could not be used, and why

    def shaped(self, shape: str) -> Rows:
        """Return the rows in the shape that an algorithm learns from.

        Raises:
            DataError: they do not hold what it needs.
        """
        train, held_out = (reshape(rows, self.format, shape) for rows in (self.train, self.eval))
        return replace(self, train=train, eval=held_out)


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
) -> Rows:
    """Read JSON lines (or one JSON list) from a file or a glob.

    Raises:
        DataError: by file, line and field, what cannot be used; or nothing is left to train on.
    """
    train, found, skipped, source = _read_files(path, format, on_error)
    held_out: list[Row] | None = None
    if eval_path is not None:
        held_out, _, also, eval_source = _read_files(eval_path, format, on_error)
        source |= eval_source
        skipped += also
    train, held_out = _split(train, held_out, eval_share, max_rows, max_eval_rows)
    return Rows(train, held_out, found, source, _template(chat_template), skipped=tuple(skipped))


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
) -> Rows:
    """Load a data set from the Hugging Face hub, or a folder that `datasets` can read.

    Raises:
        DataError: it cannot be loaded, or by row and field, what cannot be used.
    """
    from datasets import load_dataset

    def load(name: str) -> tuple[list[Row], str, list[str]]:
        try:
            loaded = load_dataset(path, subset, revision=revision, split=name)
        except (OSError, ValueError) as error:
            raise DataError(f"data.path: {path} ({name}) cannot be loaded: {error}") from error
        numbered = ((f"{path}[{name}] row {i}", row) for i, row in enumerate(loaded))
        return convert(numbered, format, f"{path}[{name}]", on_error)

    train, found, skipped = load(split)
    held_out = None
    if eval_split:
        held_out, _, also = load(eval_split)
        skipped += also
    train, held_out = _split(train, held_out, eval_share, max_rows, max_eval_rows)
    if Path(path).exists():
        files = sorted(p for p in Path(path).rglob("*") if p.is_file())
        source = {str(p): sha256(p) for p in files}
        return Rows(
            train, held_out, found, source, _template(chat_template), skipped=tuple(skipped)
        )
    commit = _commit(path, revision)
    unpinned = f"data.revision: {path} is not pinned to a commit; this run saw {commit}"
    warning = None if revision == commit else unpinned
    source = {path: str(commit)}
    return Rows(train, held_out, found, source, _template(chat_template), warning, tuple(skipped))


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
    pattern: str, format: str, on_error: OnError
) -> tuple[list[Row], str, list[str], dict[str, str]]:
    paths = files(pattern)
    source = {}
    for path in paths:
        name = pattern if len(paths) == 1 else str(path)
        source[name] = sha256(path)
    numbered = (row for path in paths for row in lines(path, on_error))
    return *convert(numbered, format, pattern, on_error), source


def files(pattern: str) -> list[Path]:
    """Return the files that a path or a glob names, in order.

    Raises:
        DataError: there is none.
    """
    paths = sorted(Path(p) for p in glob.glob(str(asset(pattern)), recursive=True))  # noqa: PTH207
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"no file matches {pattern}")
    return paths


def lines(path: Path, on_error: OnError) -> Iterator[tuple[str, Row | DataError]]:
    """Yield `(file:line, row)`; a file that holds one JSON list is taken row by row.

    A line that cannot be read is its error, where bad rows are skipped.

    Raises:
        DataError: a line cannot be read, and bad rows are not skipped.
    """
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if raw.lstrip()[:1] == b"[":
        for number, row in enumerate(_parse(raw, f"{path}"), 1):
            yield f"{path} row {number}", row
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, _parse(line, where)
            except DataError as error:
                if on_error == "raise":
                    raise
                yield where, error


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        text = f"{where}: not UTF-8 at byte {error.start + 1}; convert the file to UTF-8"
        raise DataError(text) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(f"{where}: nested too deeply") from error


def convert(
    rows: Iterable[tuple[str, Any]], format: str, source: str, on_error: OnError
) -> tuple[list[Row], str, list[str]]:
    """Bring every row to its shape; the first row decides the format where it is `auto`.

    Args:
        rows: each with where it stands.
        format: of all of them.
        source: what they were read from, for errors.
        on_error: of a row that cannot be used.

    Returns:
        The rows, their format, and why others were skipped.

    Raises:
        DataError: by file, line and field, what cannot be used; or there are no rows.
    """
    converted: list[Row] = []
    skipped: list[str] = []
    for where, row in rows:
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise DataError(f"{where}: a row is an object {{...}}, this is {kind}")
            if format == "auto":
                format = detect(row, where)
            try:
                converted.append(FORMATS[format](row))
            except FieldError as error:
                raise DataError(f"{where}: {error} (read as {format})") from None
        except DataError as error:
            if on_error == "raise":
                raise
            skipped.append(str(error))
    if not converted:
        why = f"; {len(skipped)} were skipped, the first: {skipped[0]}" if skipped else ""
        raise DataError(f"{source}: no rows{why}")
    return converted, format, skipped


def _split(
    train: list[Row],
    held_out: list[Row] | None,
    share: float,
    max_rows: int | None,
    max_eval_rows: int | None,
) -> tuple[list[Row], list[Row]]:
    """Hold out a share of the rows where no evaluation rows were given, then apply the limits."""
    if held_out is None:
        count = min(round(len(train) * share), len(train) - 1)
        count = max(count, 1) if share and len(train) > 1 else count
        chosen = set(random.Random(SPLIT_SEED).sample(range(len(train)), count))
        held_out = [row for i, row in enumerate(train) if i in chosen]
        train = [row for i, row in enumerate(train) if i not in chosen]
    return train[:max_rows], held_out[:max_eval_rows]
