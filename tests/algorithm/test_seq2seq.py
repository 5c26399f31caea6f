"""Encoder-decoder rows: prompt and answer are separate texts with separate padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import T5Config, T5ForConditionalGeneration

from lora_exp.algorithm.seq2seq import Seq2SeqConfig, Seq2SeqTrainer
from lora_exp.data.encoding import IGNORED
from lora_exp.data.tokens import tokenise


def test_prompt_and_answer_are_encoded_and_padded_separately(base: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bcd"}]
    tokens = tokenise(
        rows, base.tokenizer, max_length=8, completion_only=False, separate=True, what="train"
    )
    end = base.tokenizer.eos_token_id
    assert [base.tokenizer.decode(ids) for ids in tokens.dataset["input_ids"]] == ["ab", "a"]
    for row, labels in zip(rows, tokens.dataset["labels"], strict=True):
        assert labels == [*base.tokenizer(row["completion"])["input_ids"], end]
    config = T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    args = Seq2SeqConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = Seq2SeqTrainer(
        T5ForConditionalGeneration(config), args, tokens.dataset, None, base.tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == batch["labels"].shape[0] == 2
    assert (batch["labels"] == IGNORED).any()
    assert isinstance(tokens.dataset, Dataset)


def test_the_passes_of_a_step_are_averaged(base: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "completion": "cd"}, {"prompt": "a", "completion": "bc"}]
    tokens = tokenise(
        rows, base.tokenizer, max_length=8, completion_only=False, separate=True, what="train"
    )
    losses = []
    for passes in (1, 2):
        torch.manual_seed(0)
        config = T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        config.decoder_start_token_id, config.dropout_rate = 0, 0.0
        args = Seq2SeqConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1, disable_tqdm=True,
            per_device_train_batch_size=2 // passes, gradient_accumulation_steps=passes,
        )  # fmt: skip
        model = T5ForConditionalGeneration(config)
        trainer = Seq2SeqTrainer(model, args, tokens.dataset, None, base.tokenizer)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_chat_without_an_answer_is_dropped_and_counted(base: Any) -> None:
    question = {"role": "user", "content": "ab"}
    rows = [
        {"messages": [question, {"role": "assistant", "content": "c"}]},
        {"messages": [question]},
    ]
    tokens = tokenise(
        rows, base.tokenizer, max_length=64, completion_only=False, separate=True, what="train"
    )
    assert (tokens.counts.rows, tokens.counts.dropped) == (1, 1)
