"""Greedy answers to held-out prompts, and how many are exactly right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track

from lora_exp.data import Row
from lora_exp.tokens import prompt_of


@dataclass(frozen=True)
class Sample:
    """One prompt, the known answer and what the model said before and after training."""

    prompt: str
    expected: str
    task: str | None
    before: str
    after: str | None = None


def answer(model: Any, tokenizer: Any, rows: list[Row], settings: Any, what: str) -> list[Sample]:
    """Answer the first rows that ask something.

    Args:
        model: with its adapter as it is now.
        tokenizer: the base's.
        rows: held-out rows; those of plain text ask nothing and are passed over.
        settings: the config's `samples`: rows, max_new_tokens, batch_size.
        what: `before` or `after`, for the progress bar.
    """
    asked = [(row, found) for row in rows if (found := prompt_of(row, tokenizer)) is not None]
    asked = asked[: settings.rows]
    batches = [
        asked[i : i + settings.batch_size] for i in range(0, len(asked), settings.batch_size)
    ]
    answers = []
    tokenizer = _left(tokenizer)
    with _generating(model):
        for batch in track(batches, f"answers {what} training", transient=True):
            said = _generate(model, tokenizer, [prompt for _, (prompt, _) in batch], settings)
            answers += [
                Sample(prompt, expected, row.get("task"), text)
                for (row, (prompt, expected)), text in zip(batch, said, strict=True)
            ]
    return answers


def exact_match(answers: list[Sample]) -> dict[str, float]:
    """Return the share of answers equal to the known ones, outer white space aside; by task too."""
    if not answers:
        return {}
    right: dict[str, list[bool]] = {"exact_match": []}
    for sample in answers:
        exact = sample.before.strip() == sample.expected.strip()
        right["exact_match"].append(exact)
        if sample.task:
            right.setdefault(f"exact_match_{sample.task}", []).append(exact)
    return {name: sum(exact) / len(exact) for name, exact in sorted(right.items())}


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def _left(tokenizer: Any) -> Any:
    """Return a copy that pads and cuts on the left.

    A copy, since a fast tokenizer keeps the padding and truncation of its last call, saves them,
    and whoever loads it gets cut prompts.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    return tokenizer


def _generate(model: Any, tokenizer: Any, prompts: list[str], settings: Any) -> list[str]:
    context = getattr(model.config, "max_position_embeddings", None) or 10**6
    inputs = tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=max(1, context - settings.max_new_tokens),
        add_special_tokens=not tokenizer.chat_template,
    ).to(model.device)
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        eos_token_id=sorted({tokenizer.eos_token_id, *stops} - {None}),
        pad_token_id=tokenizer.pad_token_id,
    )
    # prompt learning returns the new tokens after the same prompt, so one cut fits every method
    new = output[:, inputs["input_ids"].shape[1] :]
    texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts
