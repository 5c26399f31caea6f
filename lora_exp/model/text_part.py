"""The language model of a multimodal checkpoint: which class reads it, and where its modules are.

Knows nothing of images: towers and projectors stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from lora_exp.model.scoring import register_classifier
from lora_exp.model.vocabulary import grow

CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}


def class_of(config: Any, task_type: str, whole: bool = False) -> Any:
    """Return the auto class that reads a checkpoint for a task.

    A multimodal checkpoint is read by the text class that transformers has for it, as plain PEFT
    reads it; where there is none, with its towers.

    Args:
        config: the checkpoint's.
        task_type: peft's.
        whole: with its towers, even where there is a text class.

    Raises:
        ValueError: transformers has no such class.
    """
    chosen = CLASSES[task_type]
    if task_type == "SEQ_CLS" and not _brings(chosen, config):
        register_classifier(config)
    if task_type == "CAUSAL_LM" and is_multimodal(config) and (whole or not _has(chosen, config)):
        return AutoModelForMultimodalLM
    if not _has(chosen, config):
        text = f"transformers has no {chosen.__name__.removeprefix('AutoModelFor')} class"
        raise ValueError(f"{text} of kind {config.model_type}")
    return chosen


def is_multimodal(config: Any) -> bool:
    """Return whether a checkpoint has towers beside its language model."""
    return type(config) in AutoModelForMultimodalLM._model_mapping


def text_of(model: Any, config: Any) -> str | None:
    """Return the multimodal class whose language model was read alone; None: nothing is left out.

    Args:
        model: as it was read.
        config: the checkpoint's.
    """
    if type(model.config) is type(config):
        return None
    return str((config.architectures or [type(config).__name__])[0])


def _has(auto_class: Any, config: Any) -> bool:
    """Return whether an auto class knows a checkpoint, or comes with it as code of its own."""
    return type(config) in auto_class._model_mapping or _brings(auto_class, config)


def _brings(auto_class: Any, config: Any) -> bool:
    """Return whether an auto class's model comes with a checkpoint as code of its own."""
    return auto_class.__name__ in (getattr(config, "auto_map", None) or {})


def name_body(model: Any) -> None:
    """Let a model name its body, where its class names the prefix of a whole checkpoint.

    Trainers look for hidden states in the body; without a name they would find the model itself.
    """
    embeddings = model.get_input_embeddings()
    if model.base_model is not model or embeddings is None:
        return
    for name, child in model.named_children():
        if any(module is embeddings for module in child.modules()) and child is not embeddings:
            model.base_model_prefix = name


def language_model(model: Any) -> tuple[str, nn.Module]:
    """Return the name and module of a model's language part; "" and itself if it has no other."""
    if model.config.get_text_config() is model.config:
        return "", model
    decoder = model.get_decoder()
    return _name_of(model, decoder), decoder


def text_modules(model: Any) -> dict[str, nn.Module]:
    """Return the modules of a model's language part, and its heads, by whole names."""
    prefix, _ = language_model(model)
    heads = (model.get_output_embeddings(), getattr(model, "score", None))
    return {
        name: module
        for name, module in model.named_modules()
        if not prefix or f"{name}.".startswith(f"{prefix}.") or any(module is h for h in heads)
    }


def fill_whole(whole: Any, text: Any) -> Any:
    """Return a multimodal model with the weights of its language model, which was read alone.

    Args:
        whole: with towers; changed in place.
        text: read from the same checkpoint by a text class.

    Raises:
        ValueError: a weight of the text has no place in the whole.
    """
    if not is_tied(text):
        untie(whole)
    grow(whole, len(text.get_input_embeddings().weight))
    pairs = [
        (_name_of(text, old).rpartition(".")[0], _name_of(whole, new).rpartition(".")[0])
        for old, new in (
            (text.get_output_embeddings(), whole.get_output_embeddings()),
            (text.get_input_embeddings(), whole.get_input_embeddings()),
        )
    ]
    state = {}
    for key, value in text.state_dict().items():
        old, new = next(
            (old, new) for old, new in reversed(pairs) if not old or key.startswith(f"{old}.")
        )
        state[".".join(filter(None, (new, key.removeprefix(old).lstrip("."))))] = value
    if unexpected := whole.load_state_dict(state, strict=False).unexpected_keys:
        raise ValueError(f"{type(whole).__name__} has no place for {unexpected[0]}")
    whole.generation_config = text.generation_config
    return whole


def untie(model: Any) -> None:
    """Let a model's output embeddings have weights of their own."""
    if is_tied(model):
        head = _plain(model.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def is_tied(model: Any) -> bool:
    """Return whether a model's output embeddings are those of its input."""
    first, head = map(_plain, (model.get_input_embeddings(), model.get_output_embeddings()))
    return head is not None and head.weight is first.weight


def _plain(layer: Any) -> Any:
    """Return a layer of the base below peft's wrapper."""
    return getattr(layer, "base_layer", getattr(layer, "original_module", layer))


def _name_of(model: Any, wanted: nn.Module) -> str:
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    return names[id(wanted)]
