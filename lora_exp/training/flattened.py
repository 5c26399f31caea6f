"""Whether the base can compute a batch whose rows are one sequence: packed or padding-free ones."""

from __future__ import annotations

from typing import Any

import pyarrow.compute

from lora_exp.errors import ConfigError
from lora_exp.model.packing import TOKENS, keeps_rows_apart


def check_flattened(trainer: Any, model: Any) -> None:
    """Refuse batches that are one sequence longer than the base can compute.

    Most architectures compute them, since positions begin anew in each row; those whose causal
    mask has a fixed size do not.

    Args:
        trainer: just built.
        model: its base.

    Raises:
        ConfigError: a batch is too long; the keys that make it shorter.
    """
    args = trainer.args
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or not getattr(trainer, "padding_free", False):
        return
    longest = {
        "train": _longest_batch(trainer.train_dataset, args.per_device_train_batch_size),
        "eval": _longest_batch(trainer.eval_dataset, args.per_device_eval_batch_size),
    }
    long = {split: tokens for split, tokens in longest.items() if tokens > limit}
    if long and not keeps_rows_apart(model, limit - TOKENS // 2):
        raise ConfigError([_fault(split, long[split], limit, args, model) for split in long])


def _fault(split: str, tokens: int, limit: int, args: Any, model: Any) -> tuple[str, str]:
    key = "packing" if args.packing else "padding_free"
    rows = getattr(args, f"per_device_{split}_batch_size")
    cures = ["give a smaller batch"] * (rows > 1)
    cures += ["give a smaller algorithm.args.max_length"] * args.packing
    cures += [f"leave {key} out"]
    text = f"{rows} rows of a batch are one sequence, here of up to {tokens} tokens, and"
    text = f"{text} {type(model).__name__} computes at most {limit}; {', or '.join(cures)}"
    return f"train.per_device_{split}_batch_size", text


def _longest_batch(rows: Any, size: int) -> int:
    """Return how many tokens the longest rows have that a batch can hold."""
    if "input_ids" not in (getattr(rows, "column_names", None) or ()):
        return 0
    lengths = pyarrow.compute.list_value_length(rows.data.column("input_ids"))
    return int(sum(sorted(lengths.to_pylist())[-size:]))
