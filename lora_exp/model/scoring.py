"""Classifiers with a head `score` that reads a row's last token, also where EOS tokens pad.

transformers takes the last token that is not the pad token. Where a tokenizer pads with its EOS
token, that is the token before the EOS token; critics and rewards read the EOS token itself.

Shapes: B rows of S tokens, C hidden numbers, L labels.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

STD = 0.02  # of new weights, where an architecture names none
MADE: set[type] = set()  # kinds of configs whose classifiers are ours, in this process


def register_classifier(config: Any) -> None:
    """Make a classifier for an architecture that transformers has none for, as for Mamba.

    It is transformers' generic one: the body, and a linear head `score` without a bias; it takes
    the place of one with another head, as CTRL's. Afterwards `AutoModelForSequenceClassification`
    loads and makes it, in this process.

    Raises:
        ValueError: the architecture has no body of its own either, or one that answers.
    """
    kind = type(config)
    if config.is_encoder_decoder:
        raise ValueError("an encoder-decoder has no head that scores texts; take a causal model")
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and _has_score(config):
        return
    if kind not in MODEL_MAPPING:
        raise ValueError(f"{kind.__name__} has neither a classifier nor a body to put one on")
    body = MODEL_MAPPING[kind]
    body = body[0] if isinstance(body, tuple) else body
    if issubclass(body, GenerationMixin):
        text = f"{kind.__name__} has no body to put a head on, only {body.__name__}, which answers"
        raise ValueError(f"{text}; save its language model alone, and train on that")
    classes = body.__mro__
    pretrained = classes[classes.index(PreTrainedModel) - 1]  # the architecture's own
    name = kind.__name__.removesuffix("Config").removesuffix("Text")
    namespace = {
        "base_model_prefix": pretrained.base_model_prefix or "model",  # Llama 4 text has none
        "config_class": kind,
        "__module__": pretrained.__module__,  # else transformers leaves buffers uninitialised
    }
    bases = (GenericForSequenceClassification, pretrained)
    classifier = type(f"{name}ForSequenceClassification", bases, namespace)
    AutoModelForSequenceClassification.register(kind, classifier, exist_ok=True)
    MADE.add(kind)


def _has_score(config: Any) -> bool:
    """Return whether transformers' classifier has the head that is trained, `score`."""
    with torch.device("meta"):
        return hasattr(AutoModelForSequenceClassification.from_config(config), "score")


def last_token(mask_BS: Tensor) -> Tensor:
    """Return the index of each row's last token, [B]; padding may be on either side."""
    return mask_BS.shape[1] - 1 - mask_BS.flip(1).int().argmax(1)


@cache
def scored_at_last_token(model_class: type) -> type:
    """Return a subclass of a classifier's class, of the same name, that reads the attention mask.

    Without a mask, or with labels, it computes as the class itself.
    """

    @wraps(model_class.forward)  # type: ignore[attr-defined]
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if attention_mask is None or options.get("labels") is not None:
            return model_class.forward(self, input_ids, attention_mask=attention_mask, **options)  # type: ignore[attr-defined]
        dropped = ("labels", "return_dict")
        options = {key: value for key, value in options.items() if key not in dropped}
        body = self.base_model(input_ids, attention_mask=attention_mask, **options)
        logits_BSL = self.score(body.last_hidden_state)
        rows = torch.arange(len(logits_BSL), device=logits_BSL.device)
        logits_BL = logits_BSL[rows, last_token(attention_mask)]
        return SequenceClassifierOutputWithPast(logits=logits_BL)

    namespace = {"forward": forward, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), namespace)


def new_head(model: Any) -> None:
    """Give a classification model a new random head: a shared base may have another job's.

    It is in float32 on every base, like every module that is trained whole.
    """
    config = model.config.get_text_config()
    head = nn.Linear(config.hidden_size, model.config.num_labels, bias=False, device=model.device)
    spread = getattr(config, "initializer_range", None) or getattr(config, "init_std", None)
    nn.init.normal_(head.weight, std=spread or STD)
    model.score = head
