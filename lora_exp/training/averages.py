"""Evaluation metrics as means over tokens or rows, however many rows are evaluated at a time.

Trainers average over batches, so that a short batch counts as much as a long one. Training is left
as it is. A KTO loss still depends on its batches: each has a KL estimate of its own.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from lora_exp.data.encoding import IGNORED
from lora_exp.data.tokens import virtual_tokens
from lora_exp.parallel.world import world
from lora_exp.training.longest_first import LongestFirst, may_be_ordered, tokens_of
from lora_exp.training.row_losses import RowLosses

Weighted = list[tuple[float, int]]  # a batch's mean, and the number of its tokens or rows
EXTREME = re.compile(r"(?:^|[/_])(min|max)(?:[/_]|$)")


class Averages:
    """A mixin for trainers: each batch of an evaluation is weighted by its size."""

    model: Any
    args: Any
    state: Any
    row_losses: Mapping[int, RowLosses] = MappingProxyType({})  # by step, of the last and the best
    _batches: defaultdict[str, Weighted]
    _rows: RowLosses
    _dealt: Dealt | None = None

    def get_eval_dataloader(self, *arguments: Any, **options: Any) -> Any:
        """Return batches of all held-out rows; `dataloader_drop_last` is for training rows only."""
        loader = self._all_batches(*arguments, **options)
        self._dealt = None if world.size == 1 else Dealt(loader)
        return self._dealt or loader

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """Return the trainer's sampler; the longest rows come first where any order will do."""
        sampler = super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        if type(sampler) is not SequentialSampler or not may_be_ordered(self):
            return sampler
        tokens = tokens_of(eval_dataset)
        return sampler if tokens is None else LongestFirst(tokens)

    def _all_batches(self, *arguments: Any, **options: Any) -> Any:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*arguments, **options)  # type: ignore[misc]
        finally:
            self.args.dataloader_drop_last = drop_last

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        """Evaluate; of several processes each takes some of the batches, as one would have them."""
        with world.apart():
            return super().evaluate(*arguments, **options)  # type: ignore[misc]

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Evaluate, then replace the means over batches."""
        self._batches, self._rows = defaultdict(list), RowLosses()
        output = super().evaluation_loop(*arguments, **options)  # type: ignore[misc]
        best = self.state.best_global_step
        kept = {step: rows for step, rows in self.row_losses.items() if step == best}
        rows = RowLosses(**world.pooled(vars(self._rows)))
        self.row_losses = kept | {self.state.global_step: rows}
        loss = f"{options.get('metric_key_prefix', 'eval')}_loss"
        self._batches = defaultdict(list, world.pooled(self._batches))
        if losses := self._batches.pop("loss", None):
            output.metrics[loss] = mean(losses)
        metrics = self._eval_metrics()
        for name, batches in self._batches.items():
            metrics[name] = [combined(name, batches)]  # the trainer takes the mean of one number
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:  # no batch may have both
            margin = metrics["rewards/chosen"][0] - metrics["rewards/rejected"][0]
            metrics["rewards/margins"] = [margin]
        return output

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Evaluate a batch, and store the weight of each of its metrics."""
        sizes = BatchSizes.of(inputs, self.model)
        before = {name: len(numbers) for name, numbers in self._eval_metrics().items()}
        if self._dealt is not None and self._dealt.is_another:
            super().prediction_step(model, inputs, *arguments, **options)  # type: ignore[misc]
            metrics = self._eval_metrics()
            kept = {name: metrics[name][:count] for name, count in before.items()}
            metrics.clear()
            metrics.update(kept)
            return None, None, None
        with self._rows.of_batch(model, inputs):
            output = super().prediction_step(model, inputs, *arguments, **options)  # type: ignore[misc]
        if output[0] is not None:
            self._batches["loss"].append((output[0].mean().item(), sizes.of_metric("loss")))
        for name, numbers in self._eval_metrics().items():
            if len(numbers) > before.get(name, 0) and name != "num_tokens":  # a count, not a mean
                self._batches[name].append((numbers[-1], sizes.of_metric(name)))
        return output

    def _eval_metrics(self) -> dict[str, list[float]]:
        """Return the metrics that TRL's trainers and ours collect in an evaluation."""
        collected: dict[str, Any] = getattr(self, "_metrics", {})
        metrics: dict[str, list[float]] = collected.get("eval", {})
        return metrics


class Dealt:
    """A loader's batches as far as this process takes them: every n-th one, of n processes.

    Processes in step get equally many: one without a batch in the last turn gets another's.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.is_another = False  # whether another process counts the batch

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while turn := list(islice(batches, world.size)):
            self.is_another = world.rank >= len(turn)
            if not self.is_another or world.in_step:
                yield turn[0 if self.is_another else world.rank]

    def __len__(self) -> int:
        first = 0 if world.in_step else world.rank
        return len(range(first, len(self.loader), world.size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class BatchSizes:
    """The numbers of a batch's tokens and rows, over which its metrics are means."""

    def __init__(self, rows: int, tokens: int | None = None) -> None:
        self.rows, self.tokens = rows, tokens
        self.answers: Tensor | None = None  # tokens of each answer
        self.chosen: Tensor | None = None  # which answers are chosen, or labelled true

    @classmethod
    def of(cls, inputs: Any, model: Any) -> BatchSizes:
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
            labels = inputs.get("label")
            sizes.chosen = (
                torch.arange(rows) < rows // 2  # pairs: the chosen answers come first
                if labels is None
                else torch.as_tensor(labels, dtype=torch.bool).cpu()
            )
        return sizes

    def of_metric(self, name: str) -> int:
        """Return the number of tokens or rows that a metric of the batch is the mean of."""
        if self.answers is None or self.chosen is None:
            return self.rows if self.tokens is None else self.tokens
        last_part = name.rpartition("/")[2]
        selected = {"chosen": self.chosen, "rejected": ~self.chosen}.get(last_part)
        if name == "mean_token_accuracy":
            selected = self.chosen
        if name == "entropy":
            return int(self.answers.sum())
        if selected is None:
            return self.rows
        tokens = name.startswith(("logits/", "mean_token"))
        return int(self.answers[selected].sum() if tokens else selected.sum())


def predicts_first(model: Any) -> bool:
    """Return whether a row's first label counts too: virtual tokens or an encoder predict it."""
    if model.config.is_encoder_decoder:
        return True
    configs = getattr(model, "peft_config", {}).values()
    prefix = any(str(config.peft_type).endswith("PREFIX_TUNING") for config in configs)
    return virtual_tokens(model) > 0 and not prefix


def combined(name: str, batches: Weighted) -> float:
    """Return a metric of a whole evaluation: the mean, or by its name the minimum or maximum."""
    scored = [batch for batch in batches if not math.isnan(batch[0])]  # rewards may be None
    extreme = EXTREME.search(name)
    if not scored or extreme is None:
        return mean(scored)
    return (min if extreme[1] == "min" else max)(number for number, _ in scored)


def mean(batches: Weighted) -> float:
    """Return the weighted mean; NaN if all weights are 0 or a number is NaN."""
    if len(batches) == 1:
        return batches[0][0]  # bit for bit
    total = sum(size for _, size in batches)
    return math.fsum(number * size for number, size in batches) / total if total else math.nan
