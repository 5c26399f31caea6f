"""Whether rows packed into one sequence stay separate: measured, since architectures differ.

Shapes: T tokens of one row, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS = 16  # of each of two rows
SHARE = 0.1  # tolerated share of the change that an unseparated first row causes


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """Return whether a packed row computes as it does alone.

    Packed rows are separated only by their position ids, which start at 0 in each row; some
    architectures compute attention without them, as Falcon does with ALiBi. So the logits of a
    second row behind a first one are compared with those of the row alone.

    Args:
        model: the base, with or without an adapter; its mode and the random state do not change.
    """
    vocab_size = len(model.get_input_embeddings().weight)
    ids_2T = torch.randint(vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    first_T, second_T = ids_2T.to(model.device)
    both_T, positions_T = torch.cat([first_T, second_T]), torch.arange(TOKENS, device=model.device)
    training = model.training
    model.eval()
    try:
        alone = _logits(model, second_T, positions_T)
        packed = _logits(model, both_T, positions_T.repeat(2))[TOKENS:]
        joined = _logits(model, both_T, torch.arange(2 * TOKENS, device=model.device))[TOKENS:]
    except (TypeError, ValueError):  # it takes no position ids at all
        return False
    finally:
        model.train(training)
    return bool((packed - alone).abs().max() <= SHARE * (joined - alone).abs().max())


def _logits(model: Any, ids_T: Tensor, positions_T: Tensor) -> Tensor:
    rows = {"input_ids": ids_T[None], "position_ids": positions_T[None]}
    logits_TV: Tensor = model(**rows, use_cache=False).logits[0].float()
    return logits_TV
