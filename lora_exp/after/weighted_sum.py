"""A base plus the weighted sum of several LoRAs' updates, computed from each adapter's own file.

It checks merges, so it shares no code with them: formula, ranks and scaling are written out here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_exp.adapter.mounting import check_embeddings, read_config
from lora_exp.adapter.untrusted import read_weights
from lora_exp.after.saved import Saved
from lora_exp.errors import AdapterError

Parts = dict[str, dict[str, Tensor]]  # module -> A and B
PART = re.compile(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")


class WeightedSum:
    """Updates that are added to a model's weights, and can be left out."""

    def __init__(self, model: Any, several: Sequence[Saved], weights: Sequence[float]) -> None:
        """Add the updates.

        Args:
            model: the base, in floats; tied embeddings are untied if one of the two is changed.
            several: the adapters.
            weights: of each.

        Raises:
            AdapterError: an adapter has weights that are not LoRA's, or for modules that the base
                does not have.
        """
        self._original: dict[nn.Parameter, Tensor] = {}
        # all are read before the first update, so that they are compared with the original base
        adapters = [_read(model, saved) for saved in several]
        for (config, parts), weight in zip(adapters, weights, strict=True):
            for module, update in _updates(model, config, parts):
                _untie(model, module)
                parameter: Any = module.weight
                self._original.setdefault(parameter, parameter.data)
                parameter.data = parameter.data + weight * update.to(parameter)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Compute with the base alone."""
        changed = {parameter: parameter.data for parameter in self._original}
        try:
            for parameter, original in self._original.items():
                parameter.data = original
            yield
        finally:
            for parameter, data in changed.items():
                parameter.data = data


def _read(model: Any, saved: Saved) -> tuple[Any, Parts]:
    """Return an adapter's config, and the matrices A and B of each module."""
    path = str(saved.folder)
    config, modules = read_config(path, model), dict(model.named_modules())
    weights = read_weights(path)
    embeddings = check_embeddings(model, config, weights, path)
    parts: Parts = defaultdict(dict)
    for key in weights.keys() - embeddings:
        match = PART.fullmatch(key)
        if match is None or match[1] not in modules:
            raise AdapterError(f"{path}: {key} is no LoRA weight of a module of this base")
        parts[match[1]][match[2]] = weights[key].double()
    for name, matrices in parts.items():
        if matrices.keys() != {"A", "B"}:
            raise AdapterError(f"{path}: {name} has only one of the matrices A and B")
    return config, parts


def _updates(model: Any, config: Any, parts: Parts) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield each module that an adapter changes, and the update of its weight: scaling · B A.

    The scaling is lora_alpha / r, with rsLoRA lora_alpha / √r (arXiv 2312.03732).
    """
    for name, matrices in parts.items():
        module: Any = model.get_submodule(name)
        rank = len(matrices["A"])
        alpha = (config.alpha_pattern or {}).get(name, config.lora_alpha)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        update = scaling * matrices["B"].flatten(1) @ matrices["A"].flatten(1)
        if isinstance(module, Conv1D | nn.Embedding):  # their weight is the transposed matrix
            update = update.T
        yield module, update.reshape(module.weight.shape)  # a convolution's has four dimensions


def _untie(model: Any, module: nn.Module) -> None:
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if last is not None and module in (first, last) and first.weight is last.weight:
        last.weight = nn.Parameter(last.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
