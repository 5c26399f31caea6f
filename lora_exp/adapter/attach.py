"""The adapter: which modules it adapts, how it is attached and how it is saved.

Knows nothing of rows, trainers or tracking.
"""

from __future__ import annotations

import copy
import logging
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from omegaconf import DictConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from lora_exp.adapter.mounting import (
    check_embeddings,
    check_fit,
    fitting,
    mount,
    read_config,
)
from lora_exp.adapter.untrusted import read_weights
from lora_exp.config.door import build
from lora_exp.config.initialization import saved_as_plain_lora
from lora_exp.config.start import adapter_config, check_base
from lora_exp.errors import (
    ConfigError,
    LoraExpError,
    TargetError,
    did_you_mean,
)  # fmt: skip
from lora_exp.model.loading import Base, new_head

log = logging.getLogger("lora_exp")
ROLES = ("all_linear", "attention", "mlp", "qv", "norm")
# separate query and value projections, and fused ones, as transformers' architectures name them
QUERY_VALUE = re.compile(r"q|v|q_proj|v_proj|query|value|c_attn|query_key_value|qkv|qkv_proj|Wqkv")


@dataclass(frozen=True)
class Adapted:
    """A model ready to train: with an adapter, or whole (`method` None)."""

    model: Any
    method: str | None
    modules: dict[str, int]  # adapted module's last name -> how many
    trainable: int
    total: int
    start: Path | None  # the untrained adapter, where the method rewrites the base
    callbacks: tuple[TrainerCallback, ...] = ()  # of the method
    config: Any = None  # of a whole model, to be saved: trainers change the model's own


def attach(base: Base, cfg: DictConfig, directory: Path) -> Adapted:
    """Put the config's adapter on a base, or unfreeze the whole base.

    Raises:
        TargetError: a name in target_modules, modules_to_save, exclude_modules, rank_pattern or
            alpha_pattern that the base does not have.
    """
    if cfg.algorithm.task_type == "SEQ_CLS":
        new_head(base.model)
    if cfg.peft is None:
        base.model.requires_grad_(True)
        total = sum(parameter.numel() for parameter in base.model.parameters())
        config = copy.deepcopy(base.model.config)
        return Adapted(base.model, None, {}, total, total, None, config=config)
    if cfg.adapter:
        check_base("adapter", cfg.adapter, base.revision)
    config = None if cfg.adapter else build(cfg, "peft", **_runtime(base.model, cfg))
    try:
        with warnings.catch_warnings():
            # peft would replace an invalid block size by another
            warnings.filterwarnings("error", "Invalid `oft_block_size`")
            model = (
                _saved_adapter(base.model, cfg)
                if cfg.adapter
                else peft.get_peft_model(base.model, config)
            )
    except LoraExpError:  # some are ValueErrors too
        raise
    except (ValueError, UserWarning) as error:
        raise ConfigError([("peft", str(error))]) from error
    config = model.peft_config["default"]
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's count of ranks, which peft unfreezes on 4-bit layers
            parameter.requires_grad_(False)
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper) and not hasattr(head, "bias"):
        head.bias = None  # trl reads it, and peft's wrapper of a tied head has only weights
    # peft's card names this machine's folders and is slow to write; `save` writes ours
    model.create_or_update_model_card = lambda *_: None
    adapted = getattr(model.base_model, "targeted_module_names", [])
    modules = Counter(name.rpartition(".")[2] for name in adapted)
    trainable, total = model.get_nb_trainable_parameters()
    start = None
    if not cfg.adapter and saved_as_plain_lora(vars(config)):
        start = directory / "start"
        _save_start(model, config, start)
    callbacks = (AdaLora(),) if isinstance(config, peft.AdaLoraConfig) else ()
    return Adapted(
        model, cfg.choices.peft, dict(sorted(modules.items())), trainable, total, start, callbacks
    )


def _saved_adapter(model: Any, cfg: DictConfig) -> Any:
    """Put a saved adapter on the base, to train it further; a text model's may get a new head."""
    adapter_config(cfg.adapter)  # raises if it is gone, as a resumed run's may be
    config = read_config(cfg.adapter, model)
    same_task = config.task_type in (cfg.algorithm.task_type, None)
    config.task_type, config.inference_mode = cfg.algorithm.task_type, False
    if not same_task:  # the head is new, and peft would report it as missing
        config.base_model_name_or_path = None  # peft would warn that it has another name here
        classifier = peft.get_peft_model(model, config)
        weights = read_weights(cfg.adapter)
        check_embeddings(model, config, weights, cfg.adapter)
        weights = {"base_model.model.score.weight": model.score.weight.detach()} | weights
        check_fit(classifier, weights, cfg.adapter)
        with fitting(cfg.adapter):
            peft.set_peft_model_state_dict(classifier, weights)
        return classifier
    return mount(model, config, cfg.adapter, trainable=True, apart=True)


def _runtime(model: Any, cfg: DictConfig) -> dict[str, Any]:
    """Return the arguments that depend on the base: names of modules instead of roles."""
    node = cfg.peft
    runtime: dict[str, Any] = {"task_type": cfg.algorithm.task_type}
    if node.get("target_modules") is not None:
        runtime["target_modules"] = resolve(model, node.target_modules)
    if node.get("feedforward_modules") is not None:
        feedforward = resolve(model, node.feedforward_modules)
        runtime["feedforward_modules"] = [n for n in feedforward if n in runtime["target_modules"]]
    for key in ("modules_to_save", "exclude_modules"):
        if node.get(key) is not None:
            check_names(model, f"peft.{key}", list(node[key]))
    for key in ("rank_pattern", "alpha_pattern"):
        if key in node:
            runtime[key] = dict(node[key] or {})
            check_names(model, f"peft.{key}", runtime[key])
    if "init_r" in node:
        runtime["total_step"] = 10**9  # replaced by `AdaLora` when training begins
    return runtime


def resolve(model: Any, wanted: str | Iterable[str]) -> list[str]:
    """Return the module names of this architecture that a role or a list of names stands for.

    Args:
        model: the base.
        wanted: `all_linear`, `attention`, `mlp`, `qv`, `norm`, or names as target_modules takes
            them: whole, or the last parts.

    Returns:
        Last names where they are unambiguous, else whole names, sorted.

    Raises:
        TargetError: an unknown role, a name that no module has, or a role without modules.
    """
    if not isinstance(wanted, str):
        names = list(wanted)
        check_names(model, "peft.target_modules", names)
        return sorted(names)
    wanted = "all_linear" if wanted == "all-linear" else wanted  # as peft writes it
    if wanted not in ROLES:
        near = did_you_mean(wanted, [*ROLES, *_last_names(model)])
        raise TargetError(
            f"peft.target_modules: {wanted!r} is no role ({', '.join(ROLES)}){near};"
            f" names go in a list: peft.target_modules=[{wanted}]"
        )
    members = {
        name for name, module in model.named_modules() if _has_role(wanted, name, module, model)
    }
    if not members:
        raise TargetError(
            f"peft.target_modules: {wanted}: {type(model).__name__} has no such module"
        )
    by_last: dict[str, set[str]] = {}
    for name, _ in model.named_modules():
        by_last.setdefault(name.rpartition(".")[2], set()).add(name)
    last = {name.rpartition(".")[2] for name in members}
    whole = {n for n in members if not by_last[n.rpartition(".")[2]] <= members}
    return sorted({n for n in last if by_last[n] <= members} | whole)


def _has_role(role: str, name: str, module: Any, model: Any) -> bool:
    if role == "norm":
        return "norm" in type(module).__name__.lower()
    parents, _, last = name.rpartition(".")
    in_a_layer = any(part.isdigit() for part in parents.split("."))
    if not isinstance(module, nn.Linear | Conv1D) or not in_a_layer:
        return False  # output and classification heads are outside the layers
    attention = "attn" in parents.lower() or "attention" in parents.lower()
    return {
        "all_linear": True,
        "attention": attention,
        "mlp": not attention,
        "qv": attention and QUERY_VALUE.fullmatch(last) is not None,
    }[role]


def _last_names(model: Any) -> set[str]:
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return {name for name in names if name and not name.isdigit()}


def check_names(model: Any, key: str, names: Iterable[str]) -> None:
    """Refuse names that no module has, whole or as last parts; peft would ignore some of them.

    Raises:
        TargetError: with near names for each.
    """
    whole = [f".{name}" for name, _ in model.named_modules()]
    unknown = [name for name in names if not any(module.endswith(f".{name}") for module in whole)]
    if unknown:
        known = _last_names(model)
        listed = ", ".join(f"{name!r}{did_you_mean(name, known)}" for name in unknown)
        raise TargetError(f"{key}: no module of {type(model).__name__} is called {listed}")


def _save_start(model: Any, config: Any, folder: Path) -> None:
    """Save the untrained adapter: `save` writes the difference to it, for the original base."""
    method, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder), save_embedding_layers=False)
    config.init_lora_weights = method


def save(adapted: Adapted, base: Base, folder: Path, card: str) -> None:
    """Write what was trained, the tokenizer and the model card; equal runs write equal bytes.

    PiSSA and OLoRA are written as plain LoRA of twice the rank, which fits the original base.
    """
    if adapted.method is None:
        adapted.model.config = adapted.config
        adapted.model.save_pretrained(str(folder))
    else:
        config = adapted.model.peft_config["default"]
        config.base_model_name_or_path = base.path  # not the folder on this machine
        for key in ("target_modules", "exclude_modules"):  # sets have no order
            if isinstance(getattr(config, key, None), set):
                setattr(config, key, sorted(getattr(config, key)))
        options = {}
        if adapted.start is not None:
            options["path_initial_model_for_weight_conversion"] = str(adapted.start)
        embeds = any("embed" in name for name in getattr(config, "target_modules", None) or ())
        adapted.model.save_pretrained(
            str(folder), selected_adapters=["default"], save_embedding_layers=embeds, **options
        )
        if adapted.start is not None:
            shutil.rmtree(adapted.start)
    base.tokenizer.save_pretrained(str(folder))
    (folder / "README.md").write_text(card, encoding="utf-8")


class AdaLora(TrainerCallback):  # type: ignore[misc]
    """Reallocate AdaLoRA's ranks after each update: peft leaves the call to the trainer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Set the number of steps.

        Raises:
            ConfigError: warm-up and final phase leave no step between them.
        """
        config = model.peft_config["default"]
        if config.tinit >= state.max_steps - config.tfinal:
            text = (
                f"no step is left between tinit and tfinal in {state.max_steps} steps; lower them"
            )
            raise ConfigError([("peft.tinit", text)])
        model.base_model.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Prune by the gradients of the last step, before they are cleared."""
        model.base_model.update_and_allocate(state.global_step + 1)
