"""A row as token ids and labels; labels are the loss mask.

The assistant's turns (or the completion) count in the loss, with the token that ends them; with
`completion_only_loss: false` and in plain text everything counts. `rendered` gives the spans of the
answers in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lora_exp.data.rendered import Span, ended, prompt_of, rendered
from lora_exp.data.template import handled_alarms
from lora_exp.data.turns import Row
from lora_exp.errors import DataError

IGNORED = -100  # the label that torch's cross-entropy leaves out
Encoded = tuple[list[int], list[int]] | DataError  # ids and labels, or the error of the row


def encode_separately(rows: Sequence[Row], tokenizer: Any) -> Iterator[Encoded]:
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


def encode(rows: Sequence[Row], tokenizer: Any, completion_only: bool) -> Iterator[Encoded]:
    """Yield the token ids and labels of each row, whole, or why the chat template refuses it.

    Spans of characters are mapped to tokens by the tokens' offsets, so a template needs no markers;
    a token that is partly in a span counts. A row begins with at most one BOS token and ends with
    at most one EOS token.
    """
    texts: dict[int, str] = {}
    spans: dict[int, list[Span]] = {}
    refused: dict[int, DataError] = {}
    with handled_alarms():
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
    labels = [IGNORED] * len(ids)
    for start, stop in spans:
        labels = [
            token if s < stop and e > start else label
            for token, label, (s, e) in zip(ids, labels, offsets, strict=True)
        ]
    return labels


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a plain text and its end: one BOS token, if any, and one EOS token."""
    ids: list[int] = tokenizer(ended(text, tokenizer))["input_ids"]
    return ids[without_repeated_ends(ids, tokenizer)]


def without_bos(text: str, tokenizer: Any) -> str:
    """Return a plain text without a BOS token of its own, if the tokenizer adds one."""
    if tokenizer.bos_token is None or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return text
    return text.removeprefix(tokenizer.bos_token)


def text_prompt(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a plain prompt: one BOS token, and no EOS token before the answer."""
    ids: list[int] = tokenizer(text)["input_ids"]
    ids = ids[without_repeated_ends(ids, tokenizer)]
    ends_with_eos = text.endswith(tokenizer.eos_token or "\0")
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not ends_with_eos else ids
