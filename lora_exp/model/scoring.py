"""Classifiers that score a row at its last token, also where padding is the token that ends it.

transformers looks for the last token that is not the pad token. Where a tokenizer pads with its
end token, that is the token before the end, and another one than the critic and rewards read.

Shapes: B rows of S tokens, C hidden numbers, L labels.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


def last_token(mask_BS: Tensor) -> Tensor:
    """Return the place of each row's last token, [B]; padding may be on either side."""
    return mask_BS.shape[1] - 1 - mask_BS.flip(1).int().argmax(1)


@cache
def scored_at_last_token(kind: type) -> type:
    """Return a subclass of a classifier's class, of the same name, that reads the attention mask.

    Without a mask, and for labels, it is the class itself.
    """

    @wraps(kind.forward)  # type: ignore[attr-defined]
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Any:
        if attention_mask is None or more.get("labels") is not None:
            return kind.forward(self, input_ids, attention_mask=attention_mask, **more)  # type: ignore[attr-defined]
        more = {key: value for key, value in more.items() if key not in ("labels", "return_dict")}
        body = self.base_model(input_ids, attention_mask=attention_mask, **more)
        logits_BSL = self.score(body.last_hidden_state)
        rows = torch.arange(len(logits_BSL), device=logits_BSL.device)
        logits_BL = logits_BSL[rows, last_token(attention_mask)]
        return SequenceClassifierOutputWithPast(logits=logits_BL)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
