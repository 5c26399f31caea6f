"""Memory that a run held, needs or finds free: the GPU's where there is one, else the process's."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pyarrow.compute
import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEMORY = Path("/proc/meminfo")


def reset_peak() -> None:
    """Forget the peaks of the runs before in this process, as far as the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        CLEAR.write_text("5")  # resets VmHWM: proc(5)


def peak_bytes() -> int:
    """Return the peak since `reset_peak`, in bytes; 0 where the system does not tell."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return int(found[1]) * 1024 if found else 0


def keep_freed() -> None:
    """Keep freed memory for the next pass, where the C library lets us (glibc, mallopt(3)).

    It would give every large block back to the system, and take it again page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(-3, 2**30):  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def give_back() -> None:
    """Give freed memory back to the system, where the C library lets us (glibc, malloc_trim(3))."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    torch.cuda.empty_cache()


def free_bytes() -> int:
    """Return how much memory can still be taken: the GPU's where there is one."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    found = re.search(r"MemAvailable:\s*(\d+) kB", MEMORY.read_text()) if MEMORY.exists() else None
    return int(found[1]) * 1024 if found else 2**33


def training_bytes(trainer: Any) -> int:
    """Estimate, from above, what a run takes beside its base while it trains.

    Weights, gradients and Adam's two moments of what trains, 16 bytes each; what layers keep;
    logits twice. Where answers are sampled, keys and values of a whole rollout, 4 bytes each.
    """
    model, args = trainer.model, trainer.args
    config = model.config
    longest = _longest(trainer)
    tokens = longest * args.per_device_train_batch_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sampled = getattr(trainer, "rollout_size", getattr(args, "generation_batch_size", None)) or 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = 2 * heads * (config.hidden_size // config.num_attention_heads)
    cache = sampled * longest * 4 * config.num_hidden_layers * width
    kept = layer_bytes(config, tokens, args.gradient_checkpointing)
    return int(16 * trained + kept + tokens * 8 * config.vocab_size + cache)


def layer_bytes(config: Any, tokens: int, checkpointing: bool) -> int:
    """Estimate, from above, what a step's layers keep of its tokens for going back.

    Of a token in a layer 16 times the hidden size and 6 times the inner one, 4 bytes each; of every
    layer, or of one with gradient checkpointing and the hidden states of all.

    Args:
        config: the model's.
        tokens: of a step, all its rows together.
        checkpointing: whether layers are computed again on the way back.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = 4 * (16 * config.hidden_size + 6 * inner)
    layers = config.num_hidden_layers
    kept = layer + 4 * layers * config.hidden_size if checkpointing else layer * layers
    return int(tokens * kept)


def _longest(trainer: Any) -> int:
    """Return how many tokens a row can have; a prompt that is text yet, no more than bytes."""
    rows, args = trainer.train_dataset, trainer.args
    known = getattr(rows, "column_names", None) or ()
    if "input_ids" in known:
        lengths = pyarrow.compute.list_value_length(rows.data.column("input_ids"))
        return int(pyarrow.compute.max(lengths).as_py())
    context = getattr(trainer.model.config, "max_position_embeddings", None) or 1024
    limit = 2 * int(getattr(args, "max_length", None) or min(1024, context))  # rows may be pairs
    answer = getattr(args, "max_completion_length", None)
    if answer is None or "prompt" not in known:
        return limit
    return min(limit, max(len(str(p).encode()) for p in rows["prompt"]) + int(answer))
