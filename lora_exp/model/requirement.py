"""An upper bound of the memory that training takes beside its base, for a run or a job of a pack.

Imports no config and no trainer's class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.compute

from lora_exp.model.placement import device

# numbers that an optimiser keeps for a weight, by the beginning of its name
MOMENTS = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}
SMALL = 4096  # bitsandbytes keeps the moments of smaller tensors in 32 bits
# TRL computes logits in tiles of so many tokens and vocabulary entries, in
# kernels/chunked_logprob.py: none of its trainers computes the logits of a whole batch
TILE = (4096, 32768)
TILE_COPIES = {"cuda": 2, "cpu": 13}  # of a tile in the backward; on a CPU measured with trl 1.16
LOGIT_COPIES = 4  # in float32, where not tiled: with what the loss keeps, and gradients
ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")  # TRL's columns


@dataclass(frozen=True)
class Step:
    """The largest step of a run."""

    tokens: int  # of all its rows together
    scored: int  # tokens whose next token is predicted; a classifier's: 0
    tiled: bool  # whether their logits are computed in tiles
    sampled: int  # tokens of a rollout, whose keys and values are cached
    checkpointing: bool  # whether layers are computed again in the backward


def is_tiled(trainer: str, label_smoothing: float | None) -> bool:
    """Return whether a trainer computes log-probabilities without a batch's logits.

    Args:
        trainer: the module and name of its class, or of a base class.
        label_smoothing: the share spread over the vocabulary; TRL then computes all logits.
    """
    return trainer.startswith("trl.") and not label_smoothing


def training_bytes(trainer: Any) -> int:
    """Return an upper bound of the memory that a run takes beside its base while it trains.

    Args:
        trainer: just built.
    """
    args = trainer.args
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optim = str(getattr(args.optim, "value", args.optim))
    state = sum(state_bytes(p.numel(), optim, p.element_size()) for p in trained)
    weights = sum(2 * p.numel() * p.element_size() for p in trained)  # and their gradients
    return int(weights + state) + step_bytes(trainer.model.config, _step(trainer))


def loss_bytes(trainer: Any) -> int:
    """Return how much of `training_bytes` is taken only while the loss is computed: a tile.

    A pack needs it once: its jobs compute their losses one after the other.

    Args:
        trainer: just built.
    """
    step = _step(trainer)
    return _head(trainer.model.config.get_text_config(), step) if step.tiled else 0


def known_moments(optim: str) -> int | None:
    """Return how many numbers an optimiser keeps for each weight; None: unknown."""
    name = optim.removeprefix("paged_").removeprefix("galore_")
    return next((count for start, count in MOMENTS.items() if name.startswith(start)), None)


def state_bytes(count: int, optim: str, size: int) -> int:
    """Return the bytes that an optimiser keeps for a tensor; an unknown one counts as AdamW.

    Args:
        count: the tensor's numbers.
        optim: transformers' name of it.
        size: bytes of one of its numbers.
    """
    known = known_moments(optim)
    moments = 2 if known is None else known
    if "8bit" in optim and count >= SMALL:
        return count * moments
    return count * moments * size


def step_bytes(config: Any, step: Step) -> int:
    """Return an upper bound of what a step keeps for its backward and computes with.

    Args:
        config: the model's.
        step: its sizes.
    """
    config = config.get_text_config()
    return _layers(config, step) + _head(config, step) + _cache(config, step)


def _layers(config: Any, step: Step) -> int:
    """Return the bytes of activations, 4 for each number.

    A layer keeps 16 times the hidden size and 6 times the inner size for each token. All layers do;
    with gradient checkpointing only one does, and the hidden states of all are kept.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = 4 * (16 * config.hidden_size + 6 * inner)
    count = config.num_hidden_layers
    kept = layer + 4 * count * config.hidden_size if step.checkpointing else layer * count
    return int(step.tokens * kept)


def _head(config: Any, step: Step) -> int:
    """Return the bytes of logits."""
    vocab_size = int(config.vocab_size)
    if step.tiled:
        tile = 4 * min(step.scored, TILE[0]) * min(vocab_size, TILE[1])
        return tile * TILE_COPIES[device().partition(":")[0]]
    return 4 * LOGIT_COPIES * step.scored * vocab_size


def _cache(config: Any, step: Step) -> int:
    """Return the bytes of keys and values, 4 for each number; states of other mixers are few."""
    if getattr(config, "num_attention_heads", None) is None:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = 2 * heads * (config.hidden_size // config.num_attention_heads)
    return int(step.sampled * 4 * config.num_hidden_layers * width)


def _step(trainer: Any) -> Step:
    model, args = trainer.model, trainer.args
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    longest, rows = _longest_row(trainer), args.per_device_train_batch_size
    classes = (f"{c.__module__}.{c.__name__}" for c in type(trainer).__mro__)
    tiled = any(is_tiled(name, args.label_smoothing_factor) for name in classes)
    rollout = getattr(trainer, "rollout_size", getattr(args, "generation_batch_size", None)) or 0
    scored = scored_tokens(
        rows * longest,
        tiled,
        getattr(args, "max_completion_length", None),
        max(rows, args.per_device_eval_batch_size),
    )
    return Step(
        tokens=rows * longest,
        scored=0 if base.get_output_embeddings() is None else scored,
        tiled=tiled,
        sampled=rollout * longest,
        checkpointing=args.gradient_checkpointing,
    )


def scored_tokens(tokens: int, tiled: bool, answer: int | None, rows: int) -> int:
    """Return for how many tokens, at most, the next token is predicted.

    Args:
        tokens: of a step.
        tiled: the result of `is_tiled`.
        answer: tokens of a sampled answer; without tiles only these are scored.
        rows: of a step, or of a part of an evaluation.
    """
    return tokens if tiled or answer is None else rows * (answer + 1)


def _longest_row(trainer: Any) -> int:
    """Return how many tokens a row can have, both answers of a pair together.

    A prompt that is not yet tokenised has at most as many tokens as bytes.
    """
    rows, args = trainer.train_dataset, trainer.args
    columns = getattr(rows, "column_names", None) or ()
    if "input_ids" in columns:
        return _longest_list(rows, "input_ids")
    config = trainer.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or 1024
    limit = int(getattr(args, "max_length", None) or min(1024, context))
    answers = [_longest_list(rows, name) for name in ANSWERS if name in columns]
    if answers:
        prompt = _longest_list(rows, "prompt_ids") if "prompt_ids" in columns else 0
        return min(limit, prompt + max(answers)) * (2 if "rejected_ids" in columns else 1)
    answer = getattr(args, "max_completion_length", None)
    if answer is None or "prompt" not in columns:
        return 2 * limit  # rows may be pairs
    return min(2 * limit, max(len(str(p).encode()) for p in rows["prompt"]) + int(answer))


def _longest_list(rows: Any, column: str) -> int:
    lengths = pyarrow.compute.list_value_length(rows.data.column(column))
    return int(pyarrow.compute.max(lengths).as_py())
