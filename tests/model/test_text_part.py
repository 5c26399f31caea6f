"""Multimodal checkpoints: the class that reads them, their language model, and the whole again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MllamaConfig,
    MllamaForCausalLM,
    MllamaForConditionalGeneration,
    Qwen2Config,
)

from lora_exp.model.text_part import class_of, fill_whole, language_model, text_modules
from tests.conftest import tiny

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256, "eos_token_id": 2,
    "pad_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def llava() -> LlavaConfig:
    """A kind that transformers reads only with its towers."""
    vision = CLIPVisionConfig(**VISION, num_attention_heads=2, projection_dim=32)
    return LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=500)


def mllama(**text: Any) -> MllamaConfig:
    """A kind that transformers also reads with a text class, without towers."""
    vision = VISION | {
        "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 64, "max_num_tiles": 2,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]],
    }  # fmt: skip
    return MllamaConfig(
        text_config=TEXT | {"num_hidden_layers": 3, "cross_attention_layers": [1]} | text,
        vision_config=vision,
        image_token_index=500,
    )


@pytest.mark.parametrize(
    ("config", "task_type", "whole", "name"),
    [
        (LlamaConfig(**TEXT), "CAUSAL_LM", False, "AutoModelForCausalLM"),
        (LlamaConfig(**TEXT), "SEQ_CLS", False, "AutoModelForSequenceClassification"),
        (llava(), "CAUSAL_LM", False, "AutoModelForMultimodalLM"),
        (llava(), "SEQ_CLS", False, "AutoModelForSequenceClassification"),
        (mllama(), "CAUSAL_LM", False, "AutoModelForCausalLM"),
        (mllama(), "CAUSAL_LM", True, "AutoModelForMultimodalLM"),
    ],
)
def test_a_text_class_is_preferred_unless_the_whole_is_wanted(
    config: Any, task_type: str, whole: bool, name: str
) -> None:
    assert class_of(config, task_type, whole).__name__ == name


def test_a_kind_without_a_class_for_the_task_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^transformers has no CausalLM class of kind clip$"):
        class_of(CLIPConfig(), "CAUSAL_LM")


def test_the_language_model_has_no_tower(folder_of: Callable[[Any], Path]) -> None:
    base = tiny(path=str(folder_of(llava())))
    assert (base.text_of, base.auto_class) == (None, "AutoModelForMultimodalLM")
    assert language_model(base.model)[0] == "model.language_model"
    names = set(text_modules(base.model))
    assert {"lm_head", "model.language_model.layers.1.mlp.up_proj"} <= names
    assert not any("vision" in name or "projector" in name for name in names)
    text = tiny().model
    assert language_model(text) == ("", text)
    assert set(text_modules(text)) == {name for name, _ in text.named_modules()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_that_was_read_alone_goes_back_into_the_whole(
    folder_of: Callable[[Any], Path], tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(folder_of(mllama(tie_word_embeddings=tied)))
    base = tiny(path=folder)
    assert type(base.model) is MllamaForCausalLM
    assert base.text_of == "MllamaForConditionalGeneration"
    assert "have no place in the model" not in caplog.text  # the towers are left out on purpose
    assert type(base.model.base_model).__name__ == "MllamaTextModel"
    whole = tiny(path=folder, whole=True).model
    assert type(whole) is MllamaForConditionalGeneration
    tower = next(whole.model.vision_model.parameters()).clone()
    base.model.model.layers[0].mlp.up_proj.weight += 1
    ids = torch.tensor([[1, 40, 90, 7]])
    before = whole(input_ids=ids).logits
    filled = fill_whole(whole, base.model)
    assert torch.equal(filled(input_ids=ids).logits, base.model(input_ids=ids).logits)
    assert not torch.equal(filled(input_ids=ids).logits, before)
    assert torch.equal(next(filled.model.vision_model.parameters()), tower)


def test_a_text_of_another_architecture_has_no_place(folder_of: Callable[[Any], Path]) -> None:
    whole = tiny(path=str(folder_of(llava())), whole=True).model
    other = tiny(path=str(folder_of(Qwen2Config(**TEXT)))).model  # its attention has biases
    with pytest.raises(ValueError, match=r"has no place for model\.language_model\..*bias"):
        fill_whole(whole, other)


def test_a_checkpoint_with_code_of_its_own_is_not_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("clip", auto_map={"AutoModelForCausalLM": "own.Model"})
    assert class_of(config, "CAUSAL_LM").__name__ == "AutoModelForCausalLM"
