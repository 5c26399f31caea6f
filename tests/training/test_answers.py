"""Greedy answers depend on the model only, not on the batch or the generation config."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from lora_exp import compose
from lora_exp.adapter.attach import attach
from lora_exp.data import tasks
from lora_exp.training.answers import (
    GREEDY,
    Answer,
    answer,
    batches,
    exact_match_rates,
    questions,
)


def settings(**values: int) -> Any:
    return SimpleNamespace(**({"rows": 8, "max_new_tokens": 16, "batch_size": 8} | values))


def test_the_embedded_model_copies_unseen_letters(base: Any) -> None:
    rows = tasks.take({"copy": tasks.copy}, 1, 8, held_out=True)
    answers = answer(base.model, base.tokenizer, rows, settings(), "before")
    assert exact_match_rates(answers)["exact_match"] >= 0.75


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("method", ["none", "prompt_tuning", "prefix_tuning"])
def test_answers_do_not_depend_on_the_batch(fresh_base: Any, tmp_path: Any, method: str) -> None:
    model = attach(fresh_base, compose(f"peft={method}"), tmp_path).model
    rows = tasks.take(tasks.CORPUS, 2, 6, held_out=True)
    single = answer(model, fresh_base.tokenizer, rows, settings(batch_size=1), "before")
    batched = answer(model, fresh_base.tokenizer, rows, settings(batch_size=6), "before")
    assert [a.text for a in single] == [a.text for a in batched]


SETTINGS = {
    "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 3, "min_new_tokens": 12,
    "suppress_tokens": [60, 61, 62], "bad_words_ids": [[63]], "sequence_bias": [[[64], -5.0]],
    "exponential_decay_length_penalty": [2, 3.0], "stop_strings": ["e"], "temperature": 0.1,
    "do_sample": True, "top_k": 3, "num_return_sequences": 2, "guidance_scale": 2.0,
    "forced_eos_token_id": 5, "renormalize_logits": True, "max_time": 1e-9, "min_p": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("name", [*sorted(SETTINGS.keys() - {"num_return_sequences"}), "all"])
def test_greedy_answers_ignore_the_bases_generation_config(fresh_base: Any, name: str) -> None:
    rows = tasks.take({"copy": tasks.copy}, 3, 4, held_out=True)
    plain = answer(fresh_base.model, fresh_base.tokenizer, rows, settings(), "before")
    changes = SETTINGS if name == "all" else {name: SETTINGS[name]}
    for key, value in changes.items():
        setattr(fresh_base.model.generation_config, key, value)
    answers = answer(fresh_base.model, fresh_base.tokenizer, rows, settings(), "before")
    assert [a.text for a in answers] == [a.text for a in plain]
    assert getattr(fresh_base.model.generation_config, next(iter(changes))) == next(
        iter(changes.values())
    )


def test_every_setting_of_a_generation_config_is_overridden_or_no_heuristic() -> None:
    ours = {"max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p",
           "pad_token_id", "eos_token_id"}  # fmt: skip
    tokens = {"bos_token_id", "decoder_start_token_id", "forced_bos_token_id"}
    caches = {"use_cache", "cache_implementation", "cache_config", "max_cache_len"}
    outputs = {"output_attentions", "output_hidden_states", "output_scores", "output_logits",
               "return_dict_in_generate"}  # fmt: skip
    speed = {"compile_config", "disable_compile", "low_memory", "prefill_chunk_size",
             "continuous_batching_config", "transformers_version"}  # fmt: skip
    drafts = {"is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
              "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_early_exit",
              "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
              "speculation_type"}  # fmt: skip
    known = ours | tokens | caches | outputs | speed | drafts | GREEDY.keys()
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert names - known == set(), "does it act on greedy answers? then GREEDY must undo it"


def test_answering_leaves_model_and_tokenizer_unchanged(base: Any) -> None:
    base.model.train()
    assert base.tokenizer.padding_side == "right"
    state = (base.tokenizer.backend_tokenizer.to_str(), base.tokenizer.padding_side)
    answer(base.model, base.tokenizer, tasks.take(tasks.CORPUS, 2, 2, True), settings(), "x")
    assert base.model.training
    assert (base.tokenizer.backend_tokenizer.to_str(), base.tokenizer.padding_side) == state
    base.model.eval()


def test_with_virtual_tokens_only_prompts_of_equal_length_share_a_batch() -> None:
    prompts = [[1] * length for length in (3, 2, 3, 2, 2)]
    plain = SimpleNamespace()
    assert batches(prompts, plain, 3) == [[1, 3, 4], [0, 2]]
    assert batches(prompts, plain, 4) == [[1, 3, 4, 0], [2]]
    tuned = SimpleNamespace(peft_config={"default": SimpleNamespace(num_virtual_tokens=4)})
    assert batches(prompts, tuned, 4) == [[1, 3, 4], [0, 2]]


def test_rows_without_prompts_get_no_answers(base: Any) -> None:
    assert answer(base.model, base.tokenizer, [{"text": "t"}], settings(), "before") == []
    assert exact_match_rates([]) == {}


def test_only_names_are_tasks(base: Any) -> None:
    values: list[Any] = ["add", float("nan"), 3, ["add"], "a long text " * 9, None]
    rows = [{"prompt": "q", "answer": "a", "task": value} for value in values]
    asked = questions(rows, base.tokenizer, base.model, 9)
    assert [question.task for question in asked] == ["add", None, "3", *[None] * 3]


def test_exact_match_counts_by_task_too() -> None:
    answers = [
        Answer("p", "a", " a\n", "x"),
        Answer("p", "a", "b", "y"),
        Answer("p", "a", "a", None),
    ]
    rates = exact_match_rates(answers)
    assert rates == {"exact_match": 2 / 3, "exact_match_x": 1.0, "exact_match_y": 0.0}
