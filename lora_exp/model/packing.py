"""Whether rows packed into one sequence stay separate: measured, since architectures differ.

Shapes: T tokens of one row, A tokens of the rows ahead of it, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS = 16  # of each row
SHARE = 0.1  # tolerated share of the change that an unseparated row ahead causes


@torch.no_grad()
def keeps_rows_apart(model: Any, ahead: int = TOKENS) -> bool:
    """Return whether a packed row computes as it does alone.

    Packed rows are separated only by their position ids, which start at 0 in each row; some
    architectures compute attention without them, as Falcon does with ALiBi, some cannot
    compute a sequence that is longer than their context, however short its rows are, and some
    convolutions need a package that is not there. So the
    hidden states of a row behind others are compared with those of the row alone.

    Args:
        model: the base, in whose layers adapters may be; its mode and the random state stay.
        ahead: tokens of the rows ahead of the one that is compared.
    """
    vocab_size = len(model.get_input_embeddings().weight)
    generator = torch.Generator().manual_seed(0)
    ids_AT = torch.randint(vocab_size, (ahead + TOKENS,), generator=generator).to(model.device)
    positions_T = torch.arange(TOKENS, device=model.device)
    positions_A = torch.arange(ahead, device=model.device) % TOKENS
    training = model.training
    model.eval()
    try:
        alone = _hidden(model, ids_AT[-TOKENS:], positions_T)
        packed = _hidden(model, ids_AT, torch.cat([positions_A, positions_T]))
        joined = _hidden(model, ids_AT[-2 * TOKENS :], torch.arange(2 * TOKENS).to(model.device))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError):  # no position ids, or too long a sequence
        return False
    finally:
        model.train(training)
    return bool((packed - alone).abs().max() <= SHARE * (joined - alone).abs().max())


def _hidden(model: Any, ids_A: Tensor, positions_A: Tensor) -> Tensor:
    """Return the hidden states of the last row, from all that TRL's collator gives a model."""
    starts_A = positions_A == 0
    end = torch.tensor([len(ids_A)], device=ids_A.device)
    ends = torch.cat([starts_A.nonzero().flatten(), end]).int()
    longest = int(ends.diff().max())
    rows = {
        "input_ids": ids_A[None],
        "position_ids": positions_A[None],
        "seq_idx": (starts_A.cumsum(0) - 1).int()[None],
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
    if getattr(model, "_is_fsdp_managed_module", False):  # its body alone lacks the embeddings
        states = model(**rows, use_cache=False, output_hidden_states=True).hidden_states[-1]
    else:
        states = model.base_model(**rows, use_cache=False)[0]
    hidden_TH: Tensor = states[0, -TOKENS:].float()
    return hidden_TH
