"""Rows to tokens and labels, in files, cached by content."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, load_from_disk
from rich.progress import track

from lora_exp.data.encoding import IGNORED, Encoded, encode, encode_separately
from lora_exp.data.processes import in_processes
from lora_exp.data.reading import OnError
from lora_exp.data.shapes import list_faults, location_of
from lora_exp.data.template import template_of
from lora_exp.data.turns import Row
from lora_exp.errors import DataError
from lora_exp.files.paths import cache_dir

VERSION = 7  # of the loss mask (`encoding`, `rendered`) and of the files; part of the cache's key
STREAM = "chunks/stream.arrow"  # until all are written
SCHEMA = pyarrow.schema(
    [(name, pyarrow.list_(pyarrow.int32())) for name in ("input_ids", "labels")]
)
CHUNK = 1000  # rows tokenised at a time
Encode = Callable[[Sequence[Row]], Iterator[Encoded]]


@dataclass(frozen=True)
class Counts:
    """Counts of a data set's rows and tokens."""

    rows: int
    tokens: int
    trained_tokens: int  # those that count in the loss
    truncated: int  # rows cut to max_length
    dropped: int  # rows without a token that counts

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of both."""
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Lengths:
    """How many tokens the rows of a data set have before any is cut."""

    median: int
    most: int  # 99% of the rows have no more
    longest: int

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Lengths:
        """Return the summary of the lengths of at least one row."""
        ordered = sorted(lengths)
        last = len(ordered) - 1
        return cls(ordered[last // 2], ordered[-(-last * 99 // 100)], ordered[last])


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows: `input_ids`, and `labels`, `IGNORED` where a token does not count."""

    dataset: Any
    counts: Counts
    cached: bool
    refused: dict[str, str] = field(default_factory=dict)  # where a row was read -> why
    lengths: Lengths | None = None  # None: of prompts


def tokenise(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int | None,
    completion_only: bool,
    separate: bool = False,
    on_error: OnError = "raise",
    num_proc: int = 1,
    what: str,
) -> Tokens:
    """Tokenise rows, or read them from the cache if the same was tokenised before.

    Args:
        rows: of shape `completion`.
        tokenizer: a fast tokenizer with its chat template.
        max_length: tokens to keep of a row, from its start; None keeps all.
        completion_only: whether prompts are left out of the loss.
        separate: whether prompt and answer are separate sequences, as for encoder-decoder models.
        on_error: what to do with rows that the chat template refuses.
        num_proc: processes that share the rows; the tokens do not depend on it.
        what: `train` or `eval`, for messages.

    Raises:
        DataError: no row has a token that counts; there is no chat template for rows that are
            chats; or the template refuses rows (file and line are named).
    """
    if any("messages" in row for row in rows) and not tokenizer.chat_template:
        raise DataError(
            "the rows are chats, but the tokenizer has no chat template; give data.chat_template="
            "chatml or a file.jinja, or rows of prompt and completion"
        )
    key = _key(rows, tokenizer, max_length, completion_only, separate)
    folder = cache_dir() / "tokens" / key
    if (folder / "counts.json").is_file():
        tokens = _read_stored(folder, rows)
    else:
        encoder: Encode = partial(encode_separately, tokenizer=tokenizer)
        if not separate:
            encoder = partial(encode, tokenizer=tokenizer, completion_only=completion_only)
        tokenise_chunk = partial(_chunk, encoder, max_length)
        tokens = _tokenise_and_store(rows, tokenise_chunk, num_proc, what, folder)
    if tokens.refused and on_error == "raise":
        raise DataError(list_faults(list(tokens.refused.values())))
    if not tokens.counts.rows:
        raise DataError(
            f"none of the {len(rows)} {what} rows has a token that counts towards the loss"
            f" (max_length {max_length}): raise algorithm.args.max_length or shorten the prompts"
        )
    return tokens


def _read_stored(folder: Path, rows: Sequence[Row]) -> Tokens:
    saved = json.loads((folder / "counts.json").read_text())
    refused = _by_location(saved.pop("refused"), rows)
    lengths = Lengths(**saved.pop("lengths"))
    return Tokens(_read(folder), Counts(**saved), True, refused, lengths)


def _key(rows: Sequence[Row], tokenizer: Any, *options: Any) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, *options]).encode())
    names = sorted(tokenizer.special_tokens_map.items())  # templates write the BOS token, too
    for part in (_vocabulary(tokenizer), template_of(tokenizer), names):
        digest.update(f"{part}\0".encode())
    for row in rows:  # with its keys in their order: templates write calls and tools as JSON
        digest.update(json.dumps(dict(sorted(row.items())), default=str).encode())
    return digest.hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """Return the tokenizer as text, without padding and truncation, which earlier calls may set."""
    backend = tokenizer.backend_tokenizer
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    text: str = backend.to_str()
    if padding is not None:
        backend.enable_padding(**padding)
    if truncation is not None:
        backend.enable_truncation(**truncation)
    return text


@dataclass(frozen=True)
class _Chunk:
    """Some of the rows, tokenised and cut."""

    tokens: Any  # a pyarrow.RecordBatch
    counts: Counts
    lengths: list[int]
    refused: list[tuple[int, str]]  # index of the row in the chunk, and why


def _chunk(encode: Encode, max_length: int | None, rows: Sequence[Row]) -> _Chunk:
    ids, labels = _Lists(), _Lists()
    refused: list[tuple[int, str]] = []
    lengths: list[int] = []
    truncated = dropped = trained = 0
    for number, encoding in enumerate(encode([*rows])):  # each is read once
        if isinstance(encoding, DataError):
            refused.append((number, str(encoding)))
            continue
        row_ids, row_labels = encoding
        lengths.append(max(len(row_ids), len(row_labels)))
        truncated += max_length is not None and lengths[-1] > max_length
        row_labels = row_labels[:max_length]
        counted = len(row_labels) - row_labels.count(IGNORED)
        if not counted:
            dropped += 1
            continue
        trained += counted
        ids.append(row_ids[:max_length])
        labels.append(row_labels)
    counts = Counts(len(lengths) - dropped, len(ids.values), trained, truncated, dropped)
    batch = pyarrow.record_batch([ids.array(), labels.array()], schema=SCHEMA)
    return _Chunk(batch, counts, lengths, refused)


class _Lists:
    """Lists of int32; pyarrow takes several times longer to convert lists of Python's."""

    def __init__(self) -> None:
        self.values, self.ends = array("i"), array("i", [0])

    def append(self, values: list[int]) -> None:
        self.values.extend(values)
        self.ends.append(len(self.values))

    def array(self) -> Any:
        parts = (np.frombuffer(part, np.int32) for part in (self.ends, self.values))
        return pyarrow.ListArray.from_arrays(*parts)


def _tokenise_and_store(
    rows: Sequence[Row], tokenise_chunk: Callable[[Sequence[Row]], _Chunk], num_proc: int,
    what: str, folder: Path,
) -> Tokens:  # fmt: skip
    """Write to a temporary folder, then rename: two runs may tokenise the same rows at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent))
    parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    counts, refused, lengths = Counts(0, 0, 0, 0, 0), [], array("Q")
    try:
        stream = staged / STREAM
        stream.parent.mkdir()
        with pyarrow.ipc.new_stream(str(stream), SCHEMA) as file:
            chunks = in_processes(tokenise_chunk, parts, num_proc)
            for number, chunk in enumerate(_tracked(chunks, len(parts), what)):
                file.write_batch(chunk.tokens)
                counts += chunk.counts
                refused += [(number * CHUNK + i, why) for i, why in chunk.refused]
                lengths.extend(chunk.lengths)
        by_location = _by_location(refused, rows)
        if not counts.rows:
            return Tokens(None, counts, cached=False, refused=by_location)
        Dataset.from_file(str(stream)).save_to_disk(str(staged))
        shutil.rmtree(stream.parent)
        summary = Lengths.of(lengths)
        saved = asdict(counts) | {"refused": refused, "lengths": asdict(summary)}
        (staged / "counts.json").write_text(json.dumps(saved))
        with suppress(OSError):  # another run was first; its files are the same
            staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Tokens(_read(folder), counts, False, by_location, summary)


def _tracked(chunks: Iterator[_Chunk], count: int, what: str) -> Iterable[_Chunk]:
    text = f"tokenising {what} rows"
    return track(chunks, text, count, transient=True, disable=count < 5)


def _read(folder: Path) -> Dataset:
    """Return the stored tokens, which stay in their file."""
    return load_from_disk(str(folder))


def _by_location(refused: Iterable[tuple[int, str]], rows: Sequence[Row]) -> dict[str, str]:
    """Return refused rows by file and line; the cache has only their indices."""
    located = ((location_of(rows[number]), why) for number, why in refused)
    return {location: f"{location}: {why}" for location, why in located}


def virtual_tokens(model: Any) -> int:
    """Return the number of trained tokens before every prompt (prompt methods)."""
    configs = getattr(model, "peft_config", {}).values()
    return max((getattr(config, "num_virtual_tokens", 0) or 0 for config in configs), default=0)
