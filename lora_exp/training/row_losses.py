"""The loss of each held-out row, taken from evaluations as a trainer makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_exp.data.encoding import IGNORED

DIGITS = 6  # of a loss, after the point


@dataclass
class RowLosses:
    """The held-out rows of one evaluation, each in the place that it has in all three lists.

    Attributes:
        rows: hashes of what the row's tokens are, and which of them count.
        tokens: how many count.
        losses: the sum over them of -log p, nats.
    """

    rows: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @contextmanager
    def of_batch(self, model: Any, inputs: Any) -> Iterator[None]:
        """Take the losses of a batch's rows from the output of the model, called within."""
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        if labels is None:  # the loss is not one of tokens
            yield
            return
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda _, __, output: outputs.append(output))
        try:
            yield
        finally:
            hook.remove()
        if outputs and (scored := _scored(outputs[-1], labels)):
            self._add(inputs, labels, *scored)

    def _add(self, inputs: Mapping[str, Any], labels: Tensor, losses: Tensor, mask: Tensor) -> None:
        rows_BT = _rows(labels, inputs.get("position_ids"))
        sizes = torch.bincount(rows_BT.flatten()).tolist()

        def sums(values_BT: Tensor) -> Tensor:
            width = min(values_BT.shape[1], rows_BT.shape[1])  # a first token is not predicted
            values = values_BT[:, -width:].flatten().double().cpu()
            total = torch.zeros(len(sizes), dtype=torch.float64)
            return total.index_add_(0, rows_BT[:, -width:].flatten(), values)

        self.losses += [round(loss, DIGITS) for loss in sums(losses).tolist()]
        self.tokens += sums(mask).long().tolist()
        self.rows += _hashes(inputs, labels, sizes)


def _scored(output: Any, labels: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return -log p of each predicted token, and which count, [B, T]; None: they are not known."""
    if getattr(output, "log_probs", None) is not None:  # trl's, of predictions: [B, T - 1]
        return -output.log_probs, output.label_mask
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != labels.shape:
        return None
    targets = labels.to(logits.device)  # a decoder's, whose inputs are shifted already
    losses = [  # one row at a time becomes float32
        cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none")
        for row, target in zip(logits, targets, strict=True)
    ]
    return torch.stack(losses), targets != IGNORED


def _rows(labels: Tensor, positions: Tensor | None) -> Tensor:
    """Return for each token the number of its row in the batch, [B, T]; packed rows are several."""
    starts = torch.zeros(labels.shape, dtype=torch.bool)
    if positions is not None and positions.shape == labels.shape:
        starts = (positions == 0).cpu()
    starts[:, 0] = True
    return (starts.flatten().cumsum(0) - 1).view(labels.shape)


def _hashes(inputs: Mapping[str, Any], labels: Tensor, sizes: list[int]) -> list[str]:
    """Return a hash of each row's tokens and counted tokens, whatever it is padded with."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    ends = np.cumsum(sizes)[:-1]
    # a decoder's labels have another shape than the prompts
    own_ends = ends if ids.shape == labels.shape else len(ids)
    prompts = (np.split(t.cpu().numpy().ravel(), own_ends) for t in (ids, mask))
    answers = np.split(labels.cpu().numpy().ravel(), ends)
    return [
        _hash(row[attended != 0], answer[answer != IGNORED])
        for row, attended, answer in zip(*prompts, answers, strict=True)
    ]


def _hash(*tokens: Any) -> str:
    parts = [ids.astype(np.int64).tobytes() for ids in tokens]
    return blake2b(b"|".join(parts), digest_size=6).hexdigest()


def row_losses_at(trainer: Any, step: int) -> RowLosses:
    """Return the losses of the trainer's present weights, which are those of a step.

    A process that resumed has not made the evaluation itself: it is repeated, and not logged.
    """
    if step not in trainer.row_losses:
        trainer.log = lambda *_, **__: None
        try:
            trainer.evaluate()
        finally:
            del trainer.log
        step = trainer.state.global_step
    rows: RowLosses = trainer.row_losses.get(step, RowLosses())  # a trainer of one's own has none
    return rows
