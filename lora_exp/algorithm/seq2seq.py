"""Sequence to sequence: transformers' trainer for encoder-decoder models, with their padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments
from transformers import Seq2SeqTrainer as Trainer


@dataclass
class Seq2SeqConfig(Seq2SeqTrainingArguments):  # type: ignore[misc]
    """transformers' arguments and the length that prompts and answers are cut to."""

    max_length: int | None = field(
        default=512, metadata={"help": "Tokens of a prompt, and of an answer."}
    )


class Seq2SeqTrainer(Trainer):  # type: ignore[misc]
    """transformers' trainer; the decoder's inputs are the labels, shifted by the model itself."""

    def __init__(
        self,
        model: Any,
        args: Seq2SeqConfig,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        callbacks: list[Any] | None = None,
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=DataCollatorForSeq2Seq(processing_class, model=model),
            processing_class=processing_class, callbacks=callbacks,
        )  # fmt: skip
        # T5 and others take the number of a step's tokens and do not divide by it: the losses of
        # passes and processes would be added up, not averaged
        self.model_accepts_loss_kwargs = False
