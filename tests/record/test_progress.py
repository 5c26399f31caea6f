"""Previews of rows, and lines of progress."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_exp.data.encoding import IGNORED
from lora_exp.record.clock import Clock
from lora_exp.record.progress import SHOWN_TOKENS, Bar, Progression, preview


def test_the_preview_marks_tokens_that_count(base: Any) -> None:
    ids = base.tokenizer("Hi!\nYes.")["input_ids"]
    labels = [IGNORED] * (len(ids) - 2) + ids[-2:]
    text = preview(ids, labels, base.tokenizer).plain
    assert text.startswith("Hi!↵")
    assert text.count("«") == text.count("»") == 1
    assert text.endswith("»")


def test_a_long_row_is_cut_with_the_number_of_tokens_left_out(base: Any) -> None:
    ids = base.tokenizer("x " * 300)["input_ids"]
    assert preview(ids, ids, base.tokenizer).plain.endswith(
        f"» … {len(ids) - SHOWN_TOKENS} more tokens"
    )


def byte_tokenizer() -> Any:
    """Return a tokenizer whose every token is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def ids_and_labels(tokenizer: Any, *parts: tuple[str, bool]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for text, counts in parts:
        text_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += text_ids
        labels += text_ids if counts else [IGNORED] * len(text_ids)
    return ids, labels


def test_characters_of_several_tokens_are_shown_whole() -> None:
    tokenizer = byte_tokenizer()
    parts = (("问 naïve 🦙", False), ("答 é🎉", True), ("\n", False))
    shown = preview(*ids_and_labels(tokenizer, *parts), tokenizer).plain
    assert shown == "问 naïve 🦙«答 é🎉»↵"


def test_a_character_across_the_border_is_shown_once() -> None:
    tokenizer = byte_tokenizer()
    ids, labels = ids_and_labels(tokenizer, ("ab", False), ("é!", True))
    labels[2] = IGNORED  # the first of its two bytes
    assert preview(ids, labels, tokenizer).plain == "ab«é!»"


@pytest.mark.parametrize("length", [20, 161, 5000])
def test_the_first_answer_is_shown_after_a_prompt_of_any_length(base: Any, length: int) -> None:
    prompt = (("start " + "x " * length)[: length * 2] + "end?", False)
    shown = preview(
        *ids_and_labels(base.tokenizer, prompt, ("The answer.", True)), base.tokenizer
    ).plain
    assert shown.startswith("start")
    assert shown.endswith("end?«The answer.»")
    assert (" tokens … " in shown) == (length > 20)


def test_a_long_answer_after_a_long_prompt_is_cut_at_its_end() -> None:
    tokenizer = byte_tokenizer()
    ids, labels = ids_and_labels(tokenizer, ("q" * 400, False), ("é" * 200, True))
    shown = preview(ids, labels, tokenizer).plain
    assert "\N{REPLACEMENT CHARACTER}" not in shown
    assert shown.startswith("qqq")
    assert "q«é" in shown
    assert shown.endswith(" more tokens")


class RecordedBar(Bar):
    """A bar that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, str]]] = []

    def begin(self, step: int, steps: int) -> None:
        self.begun = (step, steps)

    def write(self, line: str, shown: dict[str, str]) -> None:
        self.lines.append((line, shown))

    def close(self) -> None:
        pass


def test_lines_have_step_epoch_loss_evaluation_and_time_left() -> None:
    bar, clock = RecordedBar(), Clock()
    callback = Progression(bar, clock, ["loss", "mean_token_accuracy"])
    state = SimpleNamespace(global_step=0, max_steps=10, epoch=0.0)
    eval_metrics = {"eval_loss": 2.5, "eval_mean_token_accuracy": 0.25, "eval_entropy": 9.0}
    callback.on_log(None, state, None, eval_metrics)  # before training: not printed here
    assert bar.lines == []
    callback.on_train_begin(None, state, None)
    clock.count = lambda: 640
    state = SimpleNamespace(global_step=4, max_steps=10, epoch=0.4)
    callback.on_log(None, state, None, {"loss": 3.0, "learning_rate": 2e-4})
    callback.on_log(None, state, None, eval_metrics)
    callback.on_train_end(None, state, None)
    callback.on_log(None, state, None, eval_metrics)  # after training: not printed either
    (first, first_values), (second, second_values) = bar.lines
    assert first.startswith("step 4/10  epoch 0.40  loss 3.0000  rate 2.00e-04  ")
    assert first.endswith(" tokens/s  0:00:00 left")
    assert second.startswith("step 4/10  epoch 0.40  eval loss 2.5000, mean token accuracy 0.2500")
    assert "eval" not in first_values
    assert (second_values["eval"], second_values["loss"]) == ("eval loss 2.5000  ", "3.0000")
