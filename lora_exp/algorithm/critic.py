"""PPO's critic: a second adapter on the policy's base, or a separate model, with a scalar head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from lora_exp.adapter.several import is_adapted, save_classifier
from lora_exp.model.loading import Base
from lora_exp.model.scoring import register_classifier


class Critic(nn.Module):
    """A scalar head on the policy's body with adapter `value`, or on a body of its own."""

    def __init__(self, body: Any, width: int, device: torch.device) -> None:
        super().__init__()
        self.body = body  # None: the policy's body, with adapter "value"
        self.score = nn.Linear(width, 1, bias=False, device=device)
        nn.init.normal_(
            self.score.weight, std=1e-4
        )  # values start near 0, and gradients still pass


def save_value(model: Any, base: Base, folder: Path) -> None:
    """Remove the critic from a trained policy and save it so that it can be used alone.

    It is saved as a classification adapter, or model, with one label: its score at a row's last
    token is the value of the state after that token.
    """
    critic = model.ppo_value
    if is_adapted(model):
        save_classifier(model, "value", critic.score.weight, base, folder)
    else:
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        register_classifier(config)
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
        classifier.base_model.load_state_dict(critic.body.state_dict())
        classifier.score.load_state_dict(critic.score.state_dict())
        classifier.save_pretrained(str(folder))
    base.tokenizer.save_pretrained(str(folder))
    del model.ppo_value
