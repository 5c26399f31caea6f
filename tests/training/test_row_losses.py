"""Losses of held-out rows: by hand, from outputs of both kinds of models."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_exp.training.row_losses import RowLosses, row_losses_at


class Fixed(nn.Module):
    """A model with one output."""

    def __init__(self, **output: Tensor) -> None:
        super().__init__()
        self.output = SimpleNamespace(**output)

    def forward(self, **_: Any) -> Any:
        return self.output


def of_batch(model: nn.Module, **inputs: Tensor) -> RowLosses:
    rows = RowLosses()
    with rows.of_batch(model, inputs):
        model(**inputs)
    return rows


IDS = torch.tensor([[5, 6, 7, 0], [5, 8, 9, 4]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
LABELS = torch.tensor([[-100, 6, 7, -100], [-100, -100, 9, 4]])
LOG_PROBS = torch.tensor([[-1.0, -2.0, 0.0], [0.0, -0.5, -0.25]])  # of the second token to the last


def test_the_losses_of_a_row_are_summed_over_its_counted_tokens() -> None:
    model = Fixed(log_probs=LOG_PROBS, label_mask=LABELS[:, 1:] != -100)
    rows = of_batch(model, input_ids=IDS, attention_mask=MASK, labels=LABELS)
    assert (rows.losses, rows.tokens) == ([3.0, 0.75], [2, 2])
    assert not model._forward_hooks


def test_rows_in_one_sequence_are_the_rows_apart() -> None:
    model = Fixed(log_probs=LOG_PROBS, label_mask=LABELS[:, 1:] != -100)
    apart = of_batch(model, input_ids=IDS, attention_mask=MASK, labels=LABELS)
    ids, labels = (torch.cat([t[0, :3], t[1]])[None] for t in (IDS, LABELS))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    log_probs = torch.tensor([[-1.0, -2.0, 0.0, 0.0, -0.5, -0.25]])
    model = Fixed(log_probs=log_probs, label_mask=labels[:, 1:] != -100)
    assert of_batch(model, input_ids=ids, labels=labels, position_ids=positions) == apart


def test_a_decoders_first_token_counts_and_equal_answers_to_other_prompts_are_other_rows() -> None:
    logits = torch.zeros(2, 2, 4)  # four tokens, equally likely
    labels = torch.tensor([[1, -100], [2, 3]])
    rows = of_batch(Fixed(logits=logits), input_ids=IDS, attention_mask=MASK, labels=labels)
    assert rows.tokens == [1, 2]
    assert rows.losses == [round(math.log(4), 6), round(2 * math.log(4), 6)]
    same = torch.tensor([[1, -100], [1, -100]])
    rows = of_batch(Fixed(logits=logits), input_ids=IDS, attention_mask=MASK, labels=same)
    assert len(set(rows.rows)) == 2


def test_padding_does_not_change_what_a_row_is() -> None:
    wide = (torch.cat([torch.zeros_like(t[:, :1]), t], 1) for t in (IDS, MASK))
    labels = torch.cat([torch.full_like(LABELS[:, :1], -100), LABELS], 1)
    log_probs = torch.cat([torch.zeros(2, 1), LOG_PROBS], 1)
    model = Fixed(log_probs=log_probs, label_mask=labels[:, 1:] != -100)
    ids, mask = wide
    rows = of_batch(model, input_ids=ids, attention_mask=mask, labels=labels)
    narrow = Fixed(log_probs=LOG_PROBS, label_mask=LABELS[:, 1:] != -100)
    assert rows == of_batch(narrow, input_ids=IDS, attention_mask=MASK, labels=LABELS)


def test_an_evaluation_of_another_process_is_repeated_without_a_log_line() -> None:
    logged: list[Any] = []

    class Trainer:
        def __init__(self) -> None:
            self.row_losses = {2: RowLosses(["a"], [1], [0.5])}
            self.state = SimpleNamespace(global_step=4)

        def log(self, logs: Any) -> None:
            logged.append(logs)

        def evaluate(self) -> None:
            self.log({"eval_loss": 1.0})
            self.row_losses = {4: RowLosses(["b"], [1], [0.25])}

    trainer = Trainer()
    assert row_losses_at(trainer, 2).rows == ["a"]
    assert row_losses_at(trainer, 4).rows == ["b"]
    assert logged == []
    trainer.log({})
    assert logged == [{}]
