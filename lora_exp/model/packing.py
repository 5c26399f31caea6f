"""Whether rows that are packed into one stay apart: measured, since architectures differ.

Shapes: one row of tokens, of two halves of T tokens each; V words of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS = 16  # of each half
SHARE = 0.1  # of what the first half does to the second where nothing separates them


@torch.no_grad()
def keeps_rows_apart(model: Any) -> bool:
    """Say whether a packed row computes as it does alone.

    Packed rows are told apart by their position ids alone, which begin anew with each row; some
    architectures build their attention without them, as Falcon does with ALiBi. The logits of a
    second row behind a first one are held against those of the row alone.

    Args:
        model: the base, with or without an adapter; it draws no random numbers.
    """
    words = len(model.get_input_embeddings().weight)
    drawn = torch.randint(words, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    first_T, second_T = drawn.to(model.device)
    both_T, places_T = torch.cat([first_T, second_T]), torch.arange(TOKENS, device=model.device)
    training = model.training
    model.eval()
    try:
        alone = _logits(model, second_T, places_T)
        packed = _logits(model, both_T, places_T.repeat(2))[TOKENS:]
        joined = _logits(model, both_T, torch.arange(2 * TOKENS, device=model.device))[TOKENS:]
    except (TypeError, ValueError):  # it takes no position ids at all
        return False
    finally:
        model.train(training)
    return bool((packed - alone).abs().max() <= SHARE * (joined - alone).abs().max())


def _logits(model: Any, ids_T: Tensor, places_T: Tensor) -> Tensor:
    rows = {"input_ids": ids_T[None], "position_ids": places_T[None]}
    logits_TV: Tensor = model(**rows, use_cache=False).logits[0].float()
    return logits_TV
