"""Whether a base sees the padding ahead of a shorter prompt: measured, since architectures differ.

Shapes: T tokens of a prompt, A of it and what is ahead of it, V words.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

TOKENS = 16  # of the prompt
PADDING = 5  # tokens; no multiple of a window's usual sizes
SHARE = 0.05  # tolerated share of the change that other tokens in place of the padding cause


@torch.no_grad()
def sees_padding(model: Any) -> bool:
    """Return whether a prompt's logits depend on the padding on its left.

    An attention mask hides padding in attention; some recurrences do not read it (RWKV, xLSTM,
    RecurrentGemma), and compressed attention (DeepSeek V4) moves its windows with it.

    Args:
        model: a bare base; its mode and the random state stay. One that cannot compute these tokens
            sees none.
    """
    if model.config.is_encoder_decoder:
        return False
    generator = torch.Generator().manual_seed(0)
    vocab_size = len(model.get_input_embeddings().weight)
    ids_A = torch.randint(vocab_size, (PADDING + TOKENS,), generator=generator)
    training = model.training
    model.eval()
    try:
        alone = _logits(model, ids_A[PADDING:], padding=0)
        behind = _logits(model, ids_A, padding=0)
        padded = _logits(model, ids_A, padding=PADDING)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of classes that come with a checkpoint, too; training names what fails
        return False
    finally:
        model.train(training)
    return bool((padded - alone).abs().max() > SHARE * (behind - alone).abs().max())


def _logits(model: Any, ids_A: Tensor, padding: int) -> Tensor:
    """Return the logits of the prompt, [T, V], with the positions that `generate` gives it."""
    mask_1A = torch.ones_like(ids_A)[None]
    mask_1A[:, :padding] = 0
    inputs = {"input_ids": ids_A[None], "attention_mask": mask_1A}
    if "position_ids" in signature(model.forward).parameters:
        inputs["position_ids"] = (mask_1A.cumsum(1) - 1).clamp(min=0)
    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    logits_TV: Tensor = model(**inputs, use_cache=False).logits[0, -TOKENS:].float()
    return logits_TV
