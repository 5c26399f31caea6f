"""Rows: read from files and the hub, converted to their shapes, and split.

Knows nothing of tokens; needs no torch.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora_exp.data import tasks as generated
from lora_exp.data.conversion import Columns, Converted
from lora_exp.data.conversion import convert as convert
from lora_exp.data.formats import READ
from lora_exp.data.reading import OnError, files, lines, without_nulls
from lora_exp.data.shapes import location_of, reshape
from lora_exp.data.stored import selected
from lora_exp.data.template import template_file
from lora_exp.data.turns import Row
from lora_exp.errors import DataError
from lora_exp.files.whole import sha256

log = logging.getLogger("lora_exp")
Format = Literal[
    "auto", "preference", "unpaired_preference", "messages", "sharegpt", "alpaca",
    "prompt_completion", "text", "prompt",
]  # fmt: skip
SPLIT_SEED = 0  # the split is the same for every seed of a run
DRAWN = "lora_exp.corpus"  # name of the source in run.json; a resume compares it


@dataclass(frozen=True)
class Rows:
    """A data set, and its source."""

    train: Sequence[Row]
    eval: Sequence[Row]
    format: str
    source: dict[str, str]  # file -> SHA-256, or hub id -> revision
    chat_template: str | None  # Jinja text that replaces the model's own
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()  # where rows were left out, and why
    on_error: OnError = "raise"  # what to do with rows that the chat template refuses
    num_proc: int = 1  # processes that tokenise them

    def shaped(self, shape: str) -> Rows:
        """Return the rows in the shape that an algorithm learns from.

        Raises:
            DataError: they lack fields that the shape needs.
        """
        train, held_out = (reshape(rows, self.format, shape) for rows in (self.train, self.eval))
        return replace(self, train=train, eval=held_out)

    def without(self, refused: dict[str, str]) -> Rows:
        """Return the rows without those that a chat template refuses.

        Args:
            refused: where a row was read -> why it is left out.
        """
        if not refused:
            return self
        kept = [
            selected(rows, [i for i, row in enumerate(rows) if location_of(row) not in refused])
            for rows in (self.train, self.eval)
        ]
        skipped = (*self.skipped, *refused.values())
        return replace(self, train=kept[0], eval=kept[1], skipped=skipped)

    def log_skipped(self) -> None:
        """Log each row that was left out, and warn once of all."""
        for why in self.skipped:
            log.info("skipped: %s", why)
        if self.skipped:
            text = "%d rows were left out, the first: %s; run.log lists them"
            log.warning(text, len(self.skipped), self.skipped[0])


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
    columns: dict[str, str] | None = None,
    as_chat: bool = False,
    num_proc: int = 1,
) -> Rows:
    """Read rows from a file or a glob; see `reading` for the kinds of files.

    Raises:
        DataError: rows cannot be used (file, line and field are named), or no rows are left.
    """
    loaded, source = _read_files(path, format, on_error, columns, as_chat)
    held_out = None
    if eval_path is not None:
        held_out, eval_source = _read_files(eval_path, format, on_error, columns, as_chat)
        source |= eval_source
    split = _split(loaded, held_out, eval_share, max_rows, max_eval_rows)
    return _rows(loaded, held_out, split, source, chat_template, on_error, num_proc)


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
    columns: dict[str, str] | None = None,
    as_chat: bool = False,
    num_proc: int = 1,
) -> Rows:
    """Load a data set from the Hugging Face hub, or a folder that `datasets` can read.

    Raises:
        DataError: it cannot be loaded, or rows cannot be used (row and field are named).
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    def load(name: str) -> Converted:
        try:
            loaded = load_dataset(path, subset, revision=revision, split=name)
        except (OSError, ValueError, DatasetsError) as error:
            reason = error.__cause__ or error  # the cause names the file
            raise DataError(f"data.path: {path} ({name}) cannot be loaded: {reason}") from error
        numbered = ((f"{path}[{name}] row {i}", without_nulls(row)) for i, row in enumerate(loaded))
        return convert(numbered, format, f"{path}[{name}]", on_error, columns, as_chat)

    _check_not_saved(path)
    loaded = load(split)
    held_out = load(eval_split) if eval_split else None
    split_rows = _split(loaded, held_out, eval_share, max_rows, max_eval_rows)
    if Path(path).exists():
        paths = sorted(p for p in Path(path).rglob("*") if p.is_file())
        source = {str(p): sha256(p) for p in paths}
        return _rows(loaded, held_out, split_rows, source, chat_template, on_error, num_proc)
    commit = _commit(path, revision)
    source = {path: str(commit)}
    rows = _rows(loaded, held_out, split_rows, source, chat_template, on_error, num_proc)
    if revision == commit:
        return rows
    unpinned = f"data.revision: {path} is not pinned to a commit; this run saw {commit}"
    return replace(rows, warnings=(unpinned, *rows.warnings))


def _check_not_saved(path: str) -> None:
    if (Path(path) / "state.json").is_file():
        text = f"{path} was written by save_to_disk; data=jsonl data.path={path} reads it"
        raise DataError(f"data.path: {text}")


def _rows(
    loaded: Converted,
    held_out: Converted | None,
    split: tuple[Sequence[Row], Sequence[Row]],
    source: dict[str, str],
    chat_template: str | None,
    on_error: OnError,
    num_proc: int,
) -> Rows:
    """Return `Rows` with warnings about empty answers, prompts that end in a space, duplicates."""
    splits = [loaded, held_out] if held_out else [loaded]
    skipped = tuple(why for part in splits for why in part.skipped)
    train, evaluation = split
    warnings = []
    if empty := sum(part.empty for part in splits):
        warnings.append(f"{empty:,} rows have an empty answer and are left out")
    texts, spaces, duplicates = _counts(train, evaluation)
    if spaces:
        text = f"{spaces:,} of {texts:,} prompts end in white space, which most tokenizers"
        warnings.append(f"{text} join with the answer's first word; end prompts without it")
    if duplicates:
        warnings.append(
            f"{duplicates:,} of {len(evaluation):,} held-out rows are training rows, too"
        )
    return Rows(
        train, evaluation, loaded.format, source, _template(chat_template), tuple(warnings),
        skipped, on_error, num_proc,
    )  # fmt: skip


def _counts(train: Sequence[Row], held_out: Sequence[Row]) -> tuple[int, int, int]:
    """Count prompts that are text, those that end in white space, and held-out training rows."""
    contents = [_content(row) for row in held_out]
    missing, texts, spaces = set(contents), 0, 0
    for row in train:
        prompt = row.get("prompt")
        texts += isinstance(prompt, str)
        spaces += isinstance(prompt, str) and prompt[-1:].isspace()
        if missing:
            missing.discard(_content(row))
    return texts, spaces, sum(content not in missing for content in contents)


def _content(row: Row) -> int:
    """Return a hash of what is learnt from a row: another id makes no other row."""
    learnt = {key: row[key] for key in sorted(READ) if key in row}
    return hash(json.dumps(learnt, sort_keys=True, default=str))


def _commit(path: str, revision: str | None) -> str:
    """Return the commit of a revision, from the hub; without a network the revision itself."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        return str(HfApi().dataset_info(path, revision=revision).sha)
    except (OSError, HTTPError):
        return revision or "an unknown commit (the hub did not answer)"


def corpus(seed: int, rows: int, eval_rows: int, chat_template: str | None) -> Rows:
    """Generate the embedded model's training rows from a seed."""
    tasks = generated.CORPUS
    train = generated.take(tasks, seed, rows, held_out=False)
    held_out = generated.take(tasks, seed, eval_rows, held_out=True)
    source = {DRAWN: f"seed {seed}, {rows} rows"}
    return Rows(train, held_out, "messages", source, _template(chat_template))


def pairs(seed: int, rows: int, eval_rows: int, chat_template: str | None) -> Rows:
    """Generate questions with a right and a wrong answer from a seed; see `tasks.pairs`."""
    train = generated.pairs(seed, rows, held_out=False)
    held_out = generated.pairs(seed, eval_rows, held_out=True)
    source = {DRAWN: f"pairs, seed {seed}, {rows} rows"}
    return Rows(train, held_out, "preference", source, _template(chat_template))


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    if not template_file(path).is_file():
        raise DataError(f"data.chat_template: no such file: {path}")
    return template_file(path).read_text(encoding="utf-8")


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


def _split(
    loaded: Converted,
    evaluation: Converted | None,
    share: float,
    max_rows: int | None,
    max_eval_rows: int | None,
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Hold out a share of the rows if there are no evaluation rows, then apply the limits."""
    train = loaded.rows
    if evaluation is not None:
        held_out = evaluation.rows
    else:
        count = min(round(len(train) * share), len(train) - 1)
        count = max(count, 1) if share and len(train) > 1 else count
        chosen = set(random.Random(SPLIT_SEED).sample(range(len(train)), count))
        held_out = selected(train, sorted(chosen))
        train = selected(train, [i for i in range(len(train)) if i not in chosen])
    return train[:max_rows], held_out[:max_eval_rows]
