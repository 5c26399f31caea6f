"""Evaluation metrics as means over tokens or rows, however many rows are evaluated at a time.

Trainers average over batches, so that a short batch counts as much as a long one. Training is left
as it is. A KTO loss still depends on its batches: each has a KL estimate of its own.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lora_exp.data.tokens import IGNORED, virtual_tokens

Weighted = list[tuple[float, int]]  # a batch's mean, and how many tokens or rows it is of
EXTREME = re.compile(r"(?:^|[/_])(min|max)(?:[/_]|$)")


class Averages:
    """A mixin for trainers: each batch of an evaluation weighs as much as it holds."""

    model: Any
    _batches: defaultdict[str, Weighted]

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Evaluate, then replace the means over batches."""
        self._batches = defaultdict(list)
        output = super().evaluation_loop(*arguments, **options)  # type: ignore[misc]
        loss = f"{options.get('metric_key_prefix', 'eval')}_loss"
        if loss in output.metrics:
            output.metrics[loss] = mean(self._batches.pop("loss"))
        metrics = self._evaluated()
        for name, batches in self._batches.items():
            metrics[name] = [combined(name, batches)]  # the trainer takes the mean of one number
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:  # also where no batch has
            margin = metrics["rewards/chosen"][0] - metrics["rewards/rejected"][0]
            metrics["rewards/margins"] = [margin]
        return output

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Evaluate a batch, and note how much each of its metrics weighs."""
        sizes = Sizes.of(inputs, self.model)
        before = {name: len(numbers) for name, numbers in self._evaluated().items()}
        output = super().prediction_step(model, inputs, *arguments, **options)  # type: ignore[misc]
        if output[0] is not None:
            self._batches["loss"].append((output[0].mean().item(), sizes.of_metric("loss")))
        for name, numbers in self._evaluated().items():
            if len(numbers) > before.get(name, 0) and name != "num_tokens":  # a count, no mean
                self._batches[name].append((numbers[-1], sizes.of_metric(name)))
        return output

    def _evaluated(self) -> dict[str, list[float]]:
        """Return the metrics that TRL's trainers and ours collect in an evaluation."""
        collected: dict[str, Any] = getattr(self, "_metrics", {})
        metrics: dict[str, list[float]] = collected.get("eval", {})
        return metrics


class Sizes:
    """How many tokens and rows a batch has that its metrics are means of."""

    def __init__(self, rows: int, tokens: int | None = None) -> None:
        self.rows, self.tokens = rows, tokens
        self.answers: Tensor | None = None  # tokens of each answer
        self.chosen: Tensor | None = None  # which answers are wanted

    @classmethod
    def of(cls, inputs: Any, model: Any) -> Sizes:
        """Return the sizes of a batch: of labels, pairs, labelled answers, scores or prompts."""
        if not isinstance(inputs, Mapping):
            return cls(len(inputs))
        rows = len(inputs["input_ids"])
        if "labels" in inputs:
            counted = inputs["labels"][:, 0 if predicts_first(model) else 1 :] != IGNORED
            return cls(rows, int(counted.sum()))
        sizes = cls(rows)
        if "completion_mask" in inputs:
            sizes.answers = inputs["completion_mask"][:, 1:].sum(1).cpu()
            wanted = inputs.get("label")
            sizes.chosen = (
                torch.arange(rows) < rows // 2  # pairs: the chosen answers come first
                if wanted is None
                else torch.as_tensor(wanted, dtype=torch.bool).cpu()
            )
        return sizes

    def of_metric(self, name: str) -> int:
        """Return the number of tokens or rows that a metric of the batch is the mean of."""
        if self.answers is None or self.chosen is None:
            return self.rows if self.tokens is None else self.tokens
        kind = name.rpartition("/")[2]
        whose = {"chosen": self.chosen, "rejected": ~self.chosen}.get(kind)
        if name == "mean_token_accuracy":
            whose = self.chosen
        if name == "entropy":
            return int(self.answers.sum())
        if whose is None:
            return self.rows
        tokens = name.startswith(("logits/", "mean_token"))
        return int(self.answers[whose].sum() if tokens else whose.sum())


def predicts_first(model: Any) -> bool:
    """Say whether a row's first label is predicted too: by virtual tokens, or by an encoder."""
    if model.config.is_encoder_decoder:
        return True
    configs = getattr(model, "peft_config", {}).values()
    prefix = any(str(config.peft_type).endswith("PREFIX_TUNING") for config in configs)
    return virtual_tokens(model) > 0 and not prefix


def combined(name: str, batches: Weighted) -> float:
    """Return a metric of a whole evaluation: the mean, or the least or greatest by its name."""
    scored = [batch for batch in batches if not math.isnan(batch[0])]  # a reward may score none
    extreme = EXTREME.search(name)
    if not scored or extreme is None:
        return mean(scored)
    return (min if extreme[1] == "min" else max)(number for number, _ in scored)


def mean(batches: Weighted) -> float:
    """Return the weighted mean; NaN where nothing weighs or a number is NaN."""
    if len(batches) == 1:
        return batches[0][0]  # to the bit
    total = sum(size for _, size in batches)
    return math.fsum(number * size for number, size in batches) / total if total else math.nan
