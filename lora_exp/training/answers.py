"""Greedy answers to held-out prompts, and the share that is exactly right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from lora_exp.data.encoding import text_prompt
from lora_exp.data.rendered import Prompt, prompt_of
from lora_exp.data.tokens import virtual_tokens
from lora_exp.data.turns import Row
from lora_exp.model.special_tokens import end_tokens
from lora_exp.record.console import tracked

# settings that a base's generation config may have, with values that have no effect
GREEDY: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "early_stopping": False, "length_penalty": 1.0,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "num_beam_groups": 1, "diversity_penalty": 0.0,
} | dict.fromkeys((
    "min_new_tokens", "max_time", "stop_strings", "min_p", "top_h", "bad_words_ids",
    "renormalize_logits", "forced_eos_token_id", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "token_healing", "guidance_scale",
    "watermarking_config", "constraints", "force_words_ids", "penalty_alpha", "dola_layers",
    "remove_invalid_values", "prompt_lookup_num_tokens", "use_mtp",
))  # fmt: skip


TASK_LENGTH = 64  # characters; metrics are named after tasks


@dataclass(frozen=True)
class Answer:
    """The model's answer to a prompt, and the expected answer."""

    prompt: str
    expected: str | None  # None: unknown
    text: str
    task: str | None


@dataclass(frozen=True)
class Question:
    """A row's prompt, with its tokens."""

    prompt: Prompt
    ids: list[int]
    task: str | None


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows, and the questions in them."""

    rows: Sequence[Row]
    ask: Callable[[], list[Question]]

    @cached_property
    def questions(self) -> list[Question]:
        """Return the questions that are answered."""
        return self.ask()


def questions(rows: Sequence[Row], tokenizer: Any, model: Any, count: int) -> list[Question]:
    """Return the prompts of the first rows that have one: plain text has none.

    Args:
        rows: held-out rows.
        tokenizer: the base's, with its chat template.
        model: that answers.
        count: of questions, at most.
    """
    with_prompt = ((row, p) for row in rows if (p := prompt_of(row, tokenizer)) is not None)
    selected = islice(with_prompt, count)
    return [Question(p, ids_of(p, tokenizer, model), _task(row)) for row, p in selected]


def _task(row: Row) -> str | None:
    """Return the name of a row's task; a column of that name may have something else."""
    task = row.get("task")
    is_name = isinstance(task, str | int) and len(str(task)) <= TASK_LENGTH
    return str(task) if is_name else None


def answer(
    model: Any, tokenizer: Any, rows: Sequence[Row], settings: Any, what: str
) -> list[Answer]:
    """Answer the prompts of the first rows; see `answered`."""
    asked = questions(rows, tokenizer, model, settings.rows)
    return answered(model, tokenizer, asked, settings, what)


def answered(
    model: Any, tokenizer: Any, asked: list[Question], settings: Any, what: str
) -> list[Answer]:
    """Answer questions.

    Args:
        model: with its adapter as it is now.
        tokenizer: the base's.
        asked: the questions.
        settings: the config's `samples`: max_new_tokens, batch_size.
        what: text for the progress bar.
    """
    max_tokens = room(model, settings.max_new_tokens)
    prompts = [question.ids[-max_tokens:] for question in asked]
    texts: dict[int, str] = {}
    with _generating(model):
        for batch in tracked(batches(prompts, model, settings.batch_size), f"answers {what}"):
            ids = [prompts[i] for i in batch]
            generated = generate(model, tokenizer, ids, settings.max_new_tokens)
            texts |= dict(zip(batch, generated, strict=True))
    return [
        Answer(question.prompt.text, question.prompt.answer, texts[i], question.task)
        for i, question in enumerate(asked)
    ]


def exact_match_rates(answers: list[Answer]) -> dict[str, float]:
    """Return the share of answers equal to the expected ones, stripped; also for each task."""
    matches: dict[str, list[bool]] = {}  # by metric
    for a in answers:
        if a.expected is None:
            continue
        exact = a.text.strip() == a.expected.strip()
        matches.setdefault("exact_match", []).append(exact)
        if a.task:
            matches.setdefault(f"exact_match_{a.task}", []).append(exact)
    return {name: sum(exact) / len(exact) for name, exact in sorted(matches.items())}


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def room(model: Any, max_new_tokens: int) -> int:
    """Return how many prompt tokens fit into the context together with the answer."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 10**6
    return max(1, context - max_new_tokens - virtual_tokens(model))


def ids_of(prompt: Prompt, tokenizer: Any, model: Any) -> list[int]:
    """Return a prompt's tokens, as in training.

    Those of a chat have the template's special tokens already; a text ends with an EOS token only
    for an encoder.
    """
    if not prompt.chat and not model.config.is_encoder_decoder:
        return text_prompt(prompt.text, tokenizer)
    ids: list[int] = tokenizer(prompt.text, add_special_tokens=not prompt.chat)["input_ids"]
    return ids


def batches(prompts: list[list[int]], model: Any, batch_size: int) -> list[list[int]]:
    """Group the indices of prompts into batches.

    With virtual tokens only prompts of one length share a batch: padding would come between the
    virtual tokens and the prompt, where training has none. So it is with a base that sees padding.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [by_length]
    if virtual_tokens(model) or getattr(model, "sees_padding", False):
        lengths = sorted({len(prompt) for prompt in prompts})
        groups = [[i for i in by_length if len(prompts[i]) == length] for length in lengths]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> list[str]:
    """Answer a batch of prompts; the base's generation config does not change greedy ones.

    Args:
        model: in eval mode, without gradients.
        tokenizer: the base's.
        prompts: as tokens.
        max_new_tokens: of each answer.
        temperature: 0 for greedy answers; else tokens are sampled with torch's random state.
        top_p: the share of the probability that is sampled from.
    """
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    inputs = inputs.to(model.device)
    sampled = temperature > 0
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        temperature=temperature if sampled else None,
        top_p=top_p if sampled else None,
        top_k=None,
        **({} if sampled else GREEDY),
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    # with every method the output begins with the prompt's tokens; virtual tokens are not in it
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    new = output[:, start:]
    texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts
