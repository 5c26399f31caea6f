"""Several adapters on one base: added beside the one that trains, and switched between."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType, TaskType
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_exp.adapter.mounting import read_config
from lora_exp.adapter.untrusted import read_weights
from lora_exp.errors import AdapterError
from lora_exp.model.loading import Base
from lora_exp.model.scoring import last_token

ONE_ONLY = (PeftType.ADALORA, PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING)


@contextmanager
def using(model: Any, name: str | None) -> Iterator[None]:
    """Compute with another adapter, or with the bare base (None); what trains does not change.

    Args:
        model: a PeftModel.
        name: of one of its adapters.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    before = model.active_adapter
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(name)
            yield
    finally:
        model.set_adapter(before)
        for parameter, flag in flags:
            parameter.requires_grad = flag


def add_copy(model: Any, name: str, trainable: bool) -> None:
    """Add an adapter like the one that trains: a frozen copy, or a new one that trains too.

    Args:
        model: a PeftModel.
        name: of the new adapter.
        trainable: True: newly initialised; False: frozen, with the current weights.

    Raises:
        AdapterError: the method allows one adapter only.
    """
    config = copy.deepcopy(model.peft_config["default"])
    if config.peft_type in ONE_ONLY:
        raise AdapterError(f"{config.peft_type.value} allows one adapter on a base; set peft=lora")
    if not trainable:
        config.inference_mode = True
    _add(model, name, config, trainable)
    if not trainable:
        copy_to(model, name)


def _add(model: Any, name: str, config: Any, trainable: bool) -> None:
    """Add an adapter; whether the other parameters train does not change."""
    before = {p: p.requires_grad for p in _current_parameters(model)}
    model.add_adapter(name, config)
    for parameter in _current_parameters(model):
        parameter.requires_grad = before.get(parameter, trainable)


def _current_parameters(model: Any) -> list[nn.Parameter]:
    """Return all parameters; parameters() may be a cached list, see `avoid_module_walks`."""
    return [parameter for _, parameter in model.named_parameters()]


def copy_to(model: Any, name: str) -> None:
    """Copy the weights of the adapter that trains to another, bit for bit."""
    parameters = dict(model.named_parameters())
    for path, parameter in parameters.items():
        source = ".".join("default" if part == name else part for part in path.split("."))
        if source != path and source in parameters:  # a base's own module may have the name too
            parameter.data = parameters[source].data.clone()


def add_saved(model: Any, path: Path, name: str) -> Tensor:
    """Add a saved classification adapter, frozen, and return its head's weight, [1, C].

    Args:
        model: a PeftModel on the base that the adapter was trained on.
        path: the adapter's folder.
        name: for the new adapter.

    Raises:
        AdapterError: it cannot be put on this model, or has no head.
    """
    config = read_config(str(path), model.get_base_model())
    trained = model.peft_config["default"]
    if config.peft_type != trained.peft_type or config.peft_type in ONE_ONLY:
        methods = f"{config.peft_type.value} beside {trained.peft_type.value}"
        raise AdapterError(f"{path}: {methods} cannot share a base; train both with peft=lora")
    weights = read_weights(str(path))
    heads = [key for key in weights if key.endswith("score.weight")]
    if not heads:
        text = "has no score head; a reward adapter is made by algorithm=reward"
        raise AdapterError(f"{path} {text}")
    head: Tensor = weights.pop(heads[0])
    config.modules_to_save, config.task_type = None, trained.task_type
    config.inference_mode = True
    _add(model, name, config, trainable=False)
    loaded = set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [key for key in loaded.missing_keys if f".{name}." in key]
    if unmatched := [*missing, *loaded.unexpected_keys]:
        raise AdapterError(f"{path} does not fit this base: {unmatched[:3]}")
    return head.float().to(model.device)


def save_classifier(model: Any, name: str, head_1C: Tensor, base: Base, folder: Path) -> None:
    """Save one of a model's adapters and a head as a classification adapter of one label."""
    config = copy.deepcopy(model.peft_config[name])
    config.task_type, config.modules_to_save = TaskType.SEQ_CLS, ["score"]
    config.base_model_name_or_path, config.inference_mode = base.path, True
    config.target_modules = sorted(config.target_modules or ())
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights |= {"base_model.model.score.weight": head_1C}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def changes_nothing(model: Any) -> bool:
    """Return whether the adapter is an untrained LoRA, which changes no output of the base."""
    config = model.peft_config["default"]
    if config.peft_type is not PeftType.LORA or getattr(config, "use_dora", False):
        return False
    lora_b = [p for key, p in model.named_parameters() if ".lora_B.default." in key]
    return bool(lora_b) and not any(p.count_nonzero() for p in lora_b)


def score(hidden_BSC: Tensor, mask_BS: Tensor, head_1C: Tensor) -> Tensor:
    """Return the head's number at each row's last token, [B], in float32."""
    last = last_token(mask_BS)
    hidden_BC = hidden_BSC[torch.arange(len(last), device=last.device), last]
    return nn.functional.linear(hidden_BC.float(), head_1C.float()).squeeze(-1)


def is_adapted(model: Any) -> bool:
    """Return whether a model has an adapter."""
    return isinstance(model, PeftModel)
