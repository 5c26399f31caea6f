"""What training takes beside its base, estimated from above: before a run, and by a pack for a job.

Knows no config and no trainer's class by import; B rows, V words of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow.compute

from lora_exp.model.loading import device

# numbers that an optimiser keeps of a weight, by how its name begins
MOMENTS = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0}
SMALL = 4096  # bitsandbytes keeps the moments of smaller tensors in 32 bits
# TRL multiplies hidden states by the head's weights in tiles of so many tokens and words, in
# kernels/chunked_logprob.py: no trainer of its own makes the logits of a whole batch
TILE = (4096, 32768)
TILE_COPIES = {"cuda": 2, "cpu": 13}  # of a tile on the way back; on a CPU as seen with trl 1.16
LOGIT_COPIES = 4  # in float32, where they are made: with what the loss keeps, and gradients
ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")  # TRL's columns


@dataclass(frozen=True)
class Step:
    """What one step of a run computes on, at most."""

    tokens: int  # of all its rows together
    scored: int  # tokens whose next one is looked for among all words; a classifier's: 0
    tiled: bool  # whether the logits of these are only ever made in tiles
    sampled: int  # tokens of a rollout, whose keys and values are kept while it is made
    checkpointing: bool  # whether layers are computed again on the way back


def is_tiled(trainer: str, label_smoothing: float | None) -> bool:
    """Say whether a trainer computes log-probabilities without a batch's logits.

    Args:
        trainer: the module and name of its class, or of one that it is made of.
        label_smoothing: the share that is spread over all words; TRL makes logits for it.
    """
    return trainer.startswith("trl.") and not label_smoothing


def training_bytes(trainer: Any) -> int:
    """Estimate, from above, what a run takes beside its base while it trains.

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
    """Return how much of `training_bytes` is there only while the loss is computed: a tile.

    A pack holds it once: its jobs compute their losses one after the other.

    Args:
        trainer: just built.
    """
    step = _step(trainer)
    return _head(trainer.model.config.get_text_config(), step) if step.tiled else 0


def known_moments(optim: str) -> int | None:
    """Return how many numbers an optimiser keeps of each weight, None where that is not known."""
    name = optim.removeprefix("paged_").removeprefix("galore_")
    return next((count for start, count in MOMENTS.items() if name.startswith(start)), None)


def state_bytes(count: int, optim: str, size: int) -> int:
    """Return what an optimiser keeps of a tensor; of an unknown one, what AdamW would.

    Args:
        count: the tensor's numbers.
        optim: in transformers' words.
        size: bytes of one of its numbers.
    """
    known = known_moments(optim)
    moments = 2 if known is None else known
    if "8bit" in optim and count >= SMALL:
        return count * moments
    return count * moments * size


def step_bytes(config: Any, step: Step) -> int:
    """Estimate, from above, what a step keeps for its way back and computes with.

    Args:
        config: the model's.
        step: what it computes on.
    """
    config = config.get_text_config()
    return _layers(config, step) + _head(config, step) + _cache(config, step)


def _layers(config: Any, step: Step) -> int:
    """Of a token in a layer 16 times the hidden size and 6 times the inner one, 4 bytes each.

    Of every layer, or of one with gradient checkpointing and the hidden states of all.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = 4 * (16 * config.hidden_size + 6 * inner)
    count = config.num_hidden_layers
    kept = layer + 4 * count * config.hidden_size if step.checkpointing else layer * count
    return int(step.tokens * kept)


def _head(config: Any, step: Step) -> int:
    words = int(config.vocab_size)
    if step.tiled:
        tile = 4 * min(step.scored, TILE[0]) * min(words, TILE[1])
        return tile * TILE_COPIES[device().partition(":")[0]]
    return 4 * LOGIT_COPIES * step.scored * words


def _cache(config: Any, step: Step) -> int:
    """Keys and values, 4 bytes each."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = 2 * heads * (config.hidden_size // config.num_attention_heads)
    return int(step.sampled * 4 * config.num_hidden_layers * width)


def _step(trainer: Any) -> Step:
    model, args = trainer.model, trainer.args
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    longest, rows = _longest(trainer), args.per_device_train_batch_size
    classes = (f"{each.__module__}.{each.__name__}" for each in type(trainer).__mro__)
    tiled = any(is_tiled(name, args.label_smoothing_factor) for name in classes)
    asked = getattr(trainer, "rollout_size", getattr(args, "generation_batch_size", None)) or 0
    scored = scored_tokens(
        rows * longest,
        tiled,
        getattr(args, "max_completion_length", None),
        max(rows, args.per_device_eval_batch_size),
    )
    return Step(
        tokens=rows * longest,
        scored=0 if whole.get_output_embeddings() is None else scored,
        tiled=tiled,
        sampled=asked * longest,
        checkpointing=args.gradient_checkpointing,
    )


def scored_tokens(tokens: int, tiled: bool, answer: int | None, rows: int) -> int:
    """Return of how many tokens the next one is looked for among all words, at most.

    Args:
        tokens: of a step.
        tiled: as `is_tiled` says.
        answer: tokens of a sampled answer; only these are scored where their logits are made.
        rows: of a step, or of a part of an evaluation.
    """
    return tokens if tiled or answer is None else rows * (answer + 1)


def _longest(trainer: Any) -> int:
    """Return how many tokens a row can have, both answers of a pair together.

    Of a prompt that is text yet, no more than its bytes.
    """
    rows, args = trainer.train_dataset, trainer.args
    known = getattr(rows, "column_names", None) or ()
    if "input_ids" in known:
        return _most(rows, "input_ids")
    context = getattr(trainer.model.config, "max_position_embeddings", None) or 1024
    limit = int(getattr(args, "max_length", None) or min(1024, context))
    answers = [_most(rows, name) for name in ANSWERS if name in known]
    if answers:
        prompt = _most(rows, "prompt_ids") if "prompt_ids" in known else 0
        return min(limit, prompt + max(answers)) * (2 if "rejected_ids" in known else 1)
    answer = getattr(args, "max_completion_length", None)
    if answer is None or "prompt" not in known:
        return 2 * limit  # rows may be pairs
    return min(2 * limit, max(len(str(p).encode()) for p in rows["prompt"]) + int(answer))


def _most(rows: Any, column: str) -> int:
    lengths = pyarrow.compute.list_value_length(rows.data.column(column))
    return int(pyarrow.compute.max(lengths).as_py())
