"""Rows to tokens and labels, cached by content; labels are the loss mask.

The assistant's turns (or the completion) count in the loss, with the token that ends them; with
`completion_only_loss: false` and in plain text everything counts. `rendered` gives the spans of the
answers in the text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from rich.progress import track

from lora_exp.data.reading import OnError
from lora_exp.data.rendered import Span, prompt_of, rendered
from lora_exp.data.shapes import list_faults, location_of
from lora_exp.data.template import template_of
from lora_exp.data.turns import Row
from lora_exp.errors import DataError
from lora_exp.files.paths import cache_dir

IGNORED = -100  # the label that torch's cross-entropy leaves out
VERSION = 5  # of the loss mask, here and in `rendered`; part of the cache's key
CHUNK = 1000  # rows tokenised at a time
Encoded = tuple[list[int], list[int]] | DataError  # ids and labels, or the error of the row
Encode = Callable[[list[Row], Any], Iterator[Encoded]]


@dataclass(frozen=True)
class Counts:
    """Counts of a data set's rows and tokens."""

    rows: int
    tokens: int
    trained_tokens: int  # those that count in the loss
    truncated: int  # rows cut to max_length
    dropped: int  # rows without a token that counts


@dataclass(frozen=True)
class Lengths:
    """How many tokens the rows of a data set have before any is cut."""

    median: int
    most: int  # 99% of the rows have no more
    longest: int

    @classmethod
    def of(cls, lengths: list[int]) -> Lengths:
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
    rows: list[Row],
    tokenizer: Any,
    *,
    max_length: int | None,
    completion_only: bool,
    separate: bool = False,
    on_error: OnError = "raise",
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
        encoder = (
            _encode_separately if separate else partial(encode, completion_only=completion_only)
        )
        tokens = _tokenise_and_store(rows, tokenizer, max_length, encoder, what, folder)
    if tokens.refused and on_error == "raise":
        raise DataError(list_faults(list(tokens.refused.values())))
    if not tokens.counts.rows:
        raise DataError(
            f"none of the {len(rows)} {what} rows has a token that counts towards the loss"
            f" (max_length {max_length}): raise algorithm.args.max_length or shorten the prompts"
        )
    return tokens


def _read_stored(folder: Path, rows: list[Row]) -> Tokens:
    saved = json.loads((folder / "counts.json").read_text())
    refused = _by_location(saved.pop("refused"), rows)
    lengths = Lengths(**saved.pop("lengths"))
    dataset = load_from_disk(str(folder))
    return Tokens(dataset, Counts(**saved), True, refused, lengths)


def _key(rows: list[Row], tokenizer: Any, *options: Any) -> str:
    digest = hashlib.sha256(json.dumps([VERSION, *options]).encode())
    for part in (_vocabulary(tokenizer), template_of(tokenizer), tokenizer.eos_token):
        digest.update(f"{part}\0".encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """Return the tokenizer as text, without padding and truncation, which earlier calls may set."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("padding", None)
    state.pop("truncation", None)
    return json.dumps(state, sort_keys=True)


def _tokenise_and_store(
    rows: list[Row],
    tokenizer: Any,
    max_length: int | None,
    encoder: Encode,
    what: str,
    folder: Path,
) -> Tokens:
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    refused: list[tuple[int, str]] = []  # index of the row, and why
    lengths: list[int] = []
    truncated = dropped = 0
    chunks = range(0, len(rows), CHUNK)
    for start in track(chunks, f"tokenising {what} rows", transient=True, disable=len(chunks) < 5):
        for number, encoding in enumerate(encoder(rows[start : start + CHUNK], tokenizer), start):
            if isinstance(encoding, DataError):
                refused.append((number, str(encoding)))
                continue
            row_ids, row_labels = encoding
            lengths.append(max(len(row_ids), len(row_labels)))
            truncated += max_length is not None and lengths[-1] > max_length
            row_labels = row_labels[:max_length]
            if all(label == IGNORED for label in row_labels):
                dropped += 1
                continue
            ids.append(row_ids[:max_length])
            labels.append(row_labels)
    trained = sum(label != IGNORED for row in labels for label in row)
    counts = Counts(len(ids), sum(map(len, ids)), trained, truncated, dropped)
    dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
    by_location = _by_location(refused, rows)
    if not ids:
        return Tokens(dataset, counts, cached=False, refused=by_location)
    summary = Lengths.of(lengths)
    _store(dataset, asdict(counts) | {"refused": refused, "lengths": asdict(summary)}, folder)
    return Tokens(load_from_disk(str(folder)), counts, False, by_location, summary)


def _by_location(refused: Iterable[tuple[int, str]], rows: list[Row]) -> dict[str, str]:
    """Return refused rows by file and line; the cache has only their indices."""
    located = ((location_of(rows[number]), why) for number, why in refused)
    return {location: f"{location}: {why}" for location, why in located}


def _store(dataset: Any, counts: dict[str, Any], folder: Path) -> None:
    """Write to a temporary folder, then rename: two runs may tokenise the same rows at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent))
    dataset.save_to_disk(str(staged))
    (staged / "counts.json").write_text(json.dumps(counts))
    try:
        staged.rename(folder)
    except OSError:  # another run was first; its files are the same
        shutil.rmtree(staged)


def _encode_separately(rows: list[Row], tokenizer: Any) -> Iterator[Encoded]:
    """Yield the ids of the prompt and of the answer, each with the tokenizer's special tokens."""
    for row in rows:
        try:
            prompt = prompt_of(row, tokenizer)
        except DataError as error:
            yield error
            continue
        if prompt is None and "messages" in row:  # a chat without a last answer
            yield [], []
            continue
        if prompt is None or prompt.answer is None:
            raise DataError("algorithm=seq2seq answers prompts; a row of plain text asks nothing")
        ids = tokenizer(prompt.text, add_special_tokens=not prompt.chat)["input_ids"]
        labels = tokenizer(text_target=prompt.answer)["input_ids"]
        end = tokenizer.eos_token_id
        yield ids, labels if labels[-1:] == [end] else [*labels, end]


def encode(rows: list[Row], tokenizer: Any, completion_only: bool) -> Iterator[Encoded]:
    """Yield the token ids and labels of each row, whole, or why the chat template refuses it.

    Spans of characters are mapped to tokens by the tokens' offsets, so a template needs no markers;
    a token that is partly in a span counts. A row begins with at most one BOS token and ends with
    at most one EOS token.
    """
    texts: dict[int, str] = {}
    spans: dict[int, list[Span]] = {}
    refused: dict[int, DataError] = {}
    for i, row in enumerate(rows):
        try:
            texts[i], spans[i] = rendered(row, tokenizer)
        except DataError as error:
            refused[i] = error
    encoded: dict[int, Encoded] = dict(refused)
    for chat in (False, True):
        indices = [i for i in texts if ("messages" in rows[i]) == chat]
        if not indices:
            continue
        # a chat template writes its own special tokens; plain text gets the tokenizer's
        batch = tokenizer(
            [texts[i] for i in indices],
            add_special_tokens=not chat,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        for i, ids, offsets in zip(
            indices, batch["input_ids"], batch["offset_mapping"], strict=True
        ):
            labels = _labels(ids, offsets, spans[i] if completion_only else None)
            part = without_repeated_ends(ids, tokenizer)
            encoded[i] = ids[part], labels[part]
    for i in range(len(rows)):
        yield encoded[i]


def without_repeated_ends(ids: list[int], tokenizer: Any) -> slice:
    """Return the part of a row without repeated BOS tokens at its start and EOS tokens at its end.

    They are repeated if a text or its template has them and the tokenizer adds its own.
    """
    start, stop = 0, len(ids)
    while ids[start : start + 2] == [tokenizer.bos_token_id] * 2:
        start += 1
    while stop - 2 >= start and ids[stop - 2 : stop] == [tokenizer.eos_token_id] * 2:
        stop -= 1
    return slice(start, stop)


def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: list[Span] | None) -> list[int]:
    if spans is None:
        return list(ids)
    counted = [any(s < stop and e > start for start, stop in spans) for s, e in offsets]
    return [token if c else IGNORED for token, c in zip(ids, counted, strict=True)]


def text_prompt(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a plain prompt: one BOS token, and no EOS token before the answer."""
    ids: list[int] = tokenizer(text)["input_ids"]
    ids = ids[without_repeated_ends(ids, tokenizer)]
    ends_with_eos = text.endswith(tokenizer.eos_token or "\0")
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not ends_with_eos else ids


def virtual_tokens(model: Any) -> int:
    """Return the number of trained tokens before every prompt (prompt methods)."""
    configs = getattr(model, "peft_config", {}).values()
    return max((getattr(config, "num_virtual_tokens", 0) or 0 for config in configs), default=0)
