"""How much of a base is really quantised: bitsandbytes leaves classes other than nn.Linear alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn


def quantised_share(model: Any) -> tuple[float, str]:
    """Return the share of the layers' weights that is held in 4 or 8 bits, and what is not.

    Embeddings, output heads and vectors (biases, norms) are no layers' weights.

    Args:
        model: the base.

    Returns:
        From 0 to 1; the names of the largest weights that are floats, most first.
    """
    quantised, floats = 0, Counter[str]()
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or any(module is head for head in heads):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            if parameter.is_floating_point():
                last = name.rpartition(".")[2]
                floats[last if key == "weight" else f"{last}.{key}"] += parameter.numel()
            else:  # packed: two weights of 4 bits are a byte
                quantised += module.in_features * module.out_features
    share = quantised / max(1, quantised + floats.total())
    return share, ", ".join(name for name, _ in floats.most_common(4))
