"""The adapter: which modules it adapts, how it is attached and how it is saved.

Knows nothing of rows, trainers or tracking.
"""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
from omegaconf import DictConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import TrainerCallback

from lora_exp.adapter.mounting import (
    check_embeddings,
    check_fit,
    fitting,
    mount,
    read_config,
)
from lora_exp.adapter.roles import stacks_of
from lora_exp.adapter.rows import added_rows, check_tokens
from lora_exp.adapter.targets import Targets, below, check_names, of_parameters, resolve
from lora_exp.adapter.untrusted import read_weights
from lora_exp.config.door import build, plain
from lora_exp.config.initialization import saved_as_plain_lora
from lora_exp.config.pairs import quantised_faults
from lora_exp.config.start import adapter_config, check_start_base
from lora_exp.errors import (
    ConfigError,
    LoraExpError,
)  # fmt: skip
from lora_exp.model.loading import Base
from lora_exp.model.precision import is_quantised
from lora_exp.model.quantised import quantised_module
from lora_exp.model.scoring import new_head
from lora_exp.parallel.world import world

log = logging.getLogger("lora_exp")


@dataclass(frozen=True)
class Adapted:
    """A model ready to train: with an adapter, or whole (`method` None)."""

    model: Any
    method: str | None
    modules: dict[str, int]  # an adapted module's, or parameter's, last name -> how many
    trainable: int
    total: int
    start: Path | None  # the untrained adapter, where the method rewrites the base
    callbacks: tuple[TrainerCallback, ...] = ()  # of the method
    left_out: Mapping[str, str] = field(default_factory=dict)  # layer that cannot be adapted -> why
    config: Any = None  # of a whole model, to be saved: trainers change the model's own
    reference: Any = None  # a frozen copy of a whole model, where its trainer compares with one


def attach(base: Base, cfg: DictConfig, directory: Path) -> Adapted:
    """Put the config's adapter on a base, or unfreeze the whole base.

    Raises:
        TargetError: a name in target_modules, modules_to_save, exclude_modules, rank_pattern or
            alpha_pattern that the base does not have.
        ConfigError: the method cannot train on this base, or the adapter is another base's.
    """
    check_trainable(base, cfg)
    if cfg.algorithm.task_type == "SEQ_CLS":
        new_head(base.model)
    if cfg.peft is None:
        base.model.requires_grad_(True)
        total = sum(parameter.numel() for parameter in base.model.parameters())
        config = copy.deepcopy(base.model.config)
        return Adapted(base.model, None, {}, total, total, None, config=config)
    if cfg.adapter:
        consent = cfg.adapter_base is not None
        check_start_base("adapter", cfg.adapter, base.revision, base.saved_as, consent)
    model, targets = _mounted(base, cfg)
    _check_adapted(model, targets)
    config = model.peft_config["default"]
    modules = _adapted(model)
    trainable, total = model.get_nb_trainable_parameters()
    start = None
    if not cfg.adapter and saved_as_plain_lora(vars(config)):
        start = directory / "start"
        if world.is_first:
            _save_start(model, config, start)
    callbacks = (AdaLora(),) if isinstance(config, peft.AdaLoraConfig) else ()
    return Adapted(
        model, cfg.choices.peft, modules, trainable, total, start, callbacks, targets.left_out
    )


def _mounted(base: Base, cfg: DictConfig) -> tuple[Any, Targets]:
    """Put the config's adapter on a base, a new one or a saved one, and return its targets."""
    runtime, targets = ({}, Targets([])) if cfg.adapter else _runtime(base, cfg)
    config = None if cfg.adapter else build(cfg, "peft", **runtime)
    try:
        with warnings.catch_warnings():
            # peft would replace an invalid block size by another
            warnings.filterwarnings("error", "Invalid `oft_block_size`")
            warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # peft decides by the class
            # names are checked already, and peft does not know those of experts here
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
            model = (
                _saved_adapter(base, cfg)
                if cfg.adapter
                else peft.get_peft_model(base.model, config)
            )
    except LoraExpError:  # some are ValueErrors too
        raise
    except (ValueError, UserWarning) as error:
        raise ConfigError([("peft", str(error))]) from error
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's count of ranks, which peft unfreezes on 4-bit layers
            parameter.requires_grad_(False)
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, AuxiliaryTrainingWrapper) and not hasattr(head, "bias"):
        head.bias = None  # trl reads it, and peft's wrapper of a tied head has only weights
    # peft's card names this machine's folders and is slow to write; `save` writes ours
    model.create_or_update_model_card = lambda *_: None
    return model, targets


def _check_adapted(model: Any, targets: Targets) -> None:
    """Refuse an adapter on more or fewer layers than were asked for: peft may rename targets.

    Raises:
        ConfigError: with the first of them.
    """
    asked = tuple(f".{name}" for name in (*targets.modules, *targets.parameters))
    tuner = model.base_model
    adapted = [*getattr(tuner, "targeted_module_names", [])]
    adapted += getattr(tuner, "targeted_parameter_names", [])
    if asked and (others := [name for name in adapted if not f".{name}".endswith(asked)]):
        text = f"peft adapts {len(others)} layers that were not asked for, the first is {others[0]}"
        raise ConfigError([("peft.target_modules", text)])
    ends = [f".{name}" for name in adapted]
    missing = [name for name in asked if not any(end.endswith(name) for end in ends)]
    if adapted and missing and not model.peft_config["default"].exclude_modules:
        text = f"peft does not adapt {missing[0][1:]}, which was asked for; name other layers"
        raise ConfigError([("peft.target_modules", text)])


def _adapted(model: Any) -> dict[str, int]:
    """Return how many modules of a last name, and stacks of the last two, are adapted."""
    tuner = model.base_model
    names = getattr(tuner, "targeted_module_names", [])
    parameters = getattr(tuner, "targeted_parameter_names", [])
    weights = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    stacks = [".".join(n.split(".")[-2:]) for n in parameters if not n.endswith(".weight")]
    last = [name.rpartition(".")[2] for name in (*names, *weights)]
    return dict(sorted(Counter([*last, *stacks]).items()))


def _saved_adapter(base: Base, cfg: DictConfig) -> Any:
    """Put a saved adapter on the base, to train it further; a text model's may get a new head."""
    adapter_config(cfg.adapter)  # raises if it is gone, as a resumed run's may be
    model = base.model
    config = read_config(cfg.adapter, model)
    check_tokens(config, base, cfg)
    same_task = config.task_type in (cfg.algorithm.task_type, None)
    config.task_type, config.inference_mode = cfg.algorithm.task_type, False
    if not same_task:  # the head is new, and peft would report it as missing
        config.base_model_name_or_path = None  # peft would warn that it has another name here
        classifier = peft.get_peft_model(model, config)
        weights = read_weights(cfg.adapter)
        check_embeddings(model, config, weights, cfg.adapter)
        weights = {"base_model.model.score.weight": model.score.weight.detach()} | weights
        with fitting(cfg.adapter):
            peft.set_peft_model_state_dict(classifier, weights)
        check_fit(classifier, weights, cfg.adapter)
        return classifier
    return mount(model, config, cfg.adapter, trainable=True, apart=True)


def _runtime(base: Base, cfg: DictConfig) -> tuple[dict[str, Any], Targets]:
    """Return the arguments that depend on the base: names of modules instead of roles."""
    model, node = base.model, cfg.peft
    runtime: dict[str, Any] = {"task_type": cfg.algorithm.task_type}
    targets = Targets([])
    if node.get("target_modules") is not None:
        quantised = cfg.quant is not None or is_quantised(model)
        targets = resolve(model, node.target_modules, plain(node), quantised, base.revision)
        runtime["target_modules"] = targets.modules
    if targets.parameters:
        runtime["target_parameters"] = targets.parameters
    if node.get("feedforward_modules") is not None:
        feedforward = resolve(model, node.feedforward_modules, plain(node), base=base.revision)
        runtime["feedforward_modules"] = [n for n in feedforward.modules if n in targets.modules]
    if node.get("modules_to_save") is not None:
        check_names(model, "peft.modules_to_save", list(node.modules_to_save))
        if name := quantised_module(model, node.modules_to_save):
            text = f"{name} is quantised, and only floats can be trained whole"
            cure = f"quant.skip_modules=[{','.join(node.modules_to_save)}] leaves them in floats"
            raise ConfigError([("peft.modules_to_save", f"{text}; {cure}")])
    if node.get("exclude_modules") is not None:
        check_names(model, "peft.exclude_modules", list(node.exclude_modules))
        runtime["exclude_modules"] = below(model, node.exclude_modules)
    for key in ("rank_pattern", "alpha_pattern"):
        if key in node:
            stacks, values = stacks_of("experts", model), dict(node[key] or {})
            check_names(model, f"peft.{key}", values, stacks)
            runtime[key] = of_parameters(values, targets)
    if rows := added_rows(base, cfg):
        runtime["trainable_token_indices"] = rows
    if "init_r" in node:
        runtime["total_step"] = 10**9  # replaced by `AdaLora` when training begins
    return runtime, targets


def check_trainable(base: Base, cfg: DictConfig) -> None:
    """Refuse a method that cannot train on a base that was saved quantised.

    Raises:
        ConfigError: with what would be right.
    """
    form = base.form
    if form is None or form.dequantised or cfg.quant is not None:
        return
    faults = list(quantised_faults(cfg, form.method, saved=True))
    if not faults and not base.model.hf_quantizer.is_trainable:
        text = f"{base.path} is quantised ({form.method}), and cannot be trained so"
        faults = [("model.path", f"{text}; take its unquantised original, with quant=nf4")]
    if faults:
        raise ConfigError(faults)


def _save_start(model: Any, config: Any, folder: Path) -> None:
    """Save the untrained adapter: `save` writes the difference to it, for the original base."""
    method, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder), save_embedding_layers=False)
    config.init_lora_weights = method


def save(
    adapted: Adapted, base: Base, folder: Path, card: str, weights: Mapping[str, Any] | None = None
) -> None:
    """Write what was trained, the tokenizer and the model card; equal runs write equal bytes.

    PiSSA and OLoRA are written as plain LoRA of twice the rank, which fits the original base.

    Args:
        adapted: what was trained.
        base: its base.
        folder: where to.
        card: the text of the model card.
        weights: of a whole model that does not have all of its own; None: it has.
    """
    if adapted.method is None:
        adapted.model.config = adapted.config
        adapted.model.save_pretrained(str(folder), state_dict=weights)
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
