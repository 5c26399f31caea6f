"""What a config would train and take, told by its model's config: no weights are loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_exp.adapter.attach import attach
from lora_exp.config.door import CONF, plain
from lora_exp.config.initialization import saved_as_plain_lora
from lora_exp.config.settled import fingerprint
from lora_exp.config.validation import validate
from lora_exp.errors import ConfigError
from lora_exp.files.paths import asset
from lora_exp.model.loading import CLASSES, Base, unloadable
from lora_exp.model.precision import dtype_of
from lora_exp.model.requirement import (
    Step,
    is_tiled,
    known_moments,
    scored_tokens,
    state_bytes,
    step_bytes,
)
from lora_exp.record.progress import quiet

BESIDE = ("none", "nf4", "int8")
BLOCK, OUTER_BLOCK = 64, 256  # weights to a 4-bit scale, and scales to a scale of theirs


@dataclass(frozen=True)
class Need:
    """What training takes, in bytes."""

    trainable: int  # parameters
    saved: int  # of the adapter's file, or the model's
    weights: int  # of the base, and of what trains beside it
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All that is in memory together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """Tell what a config takes, and beside it the same on other bases and with every weight.

    Args:
        cfg: from `compose`.

    Returns:
        What holds for all, and `rows`, fit for JSON: the numbers of `Need`, `total`, and `measured`
        and `run` where such a run stands under outputs/ or multirun/; or why it is `refused`.

    Raises:
        ConfigError: the model's config cannot be loaded.
        TargetError: the config adapts modules that the model does not have.
    """
    quiet()
    config = model_config(cfg)
    rows = [_row(each, config, each is cfg) for each in _beside(cfg)]
    return {
        "name": cfg.name,
        "model": cfg.model.path,
        "parameters": sum(p.numel() for p in skeleton(cfg, config).parameters()),
        "tokens": tokens(cfg, config),
        "optimizer": cfg.train.optim,
        "optimizer_known": known_moments(cfg.train.optim) is not None,
        "rows": rows,
    }


def _beside(cfg: DictConfig) -> Iterator[DictConfig]:
    """Yield the config itself, and those to hold it against."""
    if cfg.choices.quant not in BESIDE:
        yield cfg
    for quant in BESIDE:
        if quant == cfg.choices.quant:
            yield cfg
        else:
            node = OmegaConf.load(CONF / "quant" / f"{quant}.yaml") if quant != "none" else None
            yield _changed(cfg, {"quant": quant}, quant=node)
    if cfg.peft is not None:
        whole = plain(cfg.model) | {"dtype": "float32"}  # as conf/peft/none.yaml says
        chosen = {"quant": "none", "peft": "none"}
        yield _changed(cfg, chosen, quant=None, peft=None, adapter=None, model=whole)


def _changed(cfg: DictConfig, chosen: dict[str, str], **sections: Any) -> DictConfig:
    values = plain(cfg) | sections | {"choices": plain(cfg.choices) | chosen}
    made: DictConfig = OmegaConf.create(values)
    return made


def _row(cfg: DictConfig, config: Any, chosen: bool) -> dict[str, Any]:
    named = {"peft": cfg.choices.peft, "quant": cfg.choices.quant, "chosen": chosen}
    try:
        validate(cfg)
    except ConfigError as error:
        return named | {"refused": error.faults[0][1]}
    found = need(cfg, config)
    return named | asdict(found) | {"total": found.total} | _measured(cfg)


def model_config(cfg: DictConfig) -> Any:
    """Load the config of the model that a run names.

    Raises:
        ConfigError: the path holds none.
    """
    keys = ("revision", "trust_remote_code", "gguf_file")
    options = {key: cfg.model[key] for key in keys if cfg.model[key] is not None}
    if cfg.algorithm.task_type == "SEQ_CLS":
        options["num_labels"] = 1
    try:
        return AutoConfig.from_pretrained(str(asset(cfg.model.path)), **options)
    except (OSError, ValueError) as error:
        raise unloadable(cfg.model.path, error) from error


def skeleton(cfg: DictConfig, config: Any) -> Any:
    """Return the model of a config without its weights: names, shapes and dtypes."""
    with torch.device("meta"):
        return CLASSES[cfg.algorithm.task_type].from_config(
            config,
            dtype=dtype_of(cfg.model.dtype),
            attn_implementation=cfg.model.attn_implementation,
            trust_remote_code=cfg.model.trust_remote_code,
        )


def need(cfg: DictConfig, config: Any) -> Need:
    """Return what a run takes.

    Args:
        cfg: the run's.
        config: of its model.

    Raises:
        TargetError: it adapts modules that the model does not have.
    """
    model = skeleton(cfg, config)
    held = base_bytes(model, cfg.quant)
    adapted = attach(Base(model, None, cfg.model.path, None, None), _unstarted(cfg), Path())
    trained = [p for p in adapted.model.parameters() if p.requires_grad]
    # an adapter trains in float32 on every base
    size = 4 if cfg.peft is not None else dtype_of(cfg.model.dtype).itemsize
    counts = [p.numel() for p in trained]
    own = size * sum(counts)
    return Need(
        trainable=sum(counts),
        saved=own if cfg.peft is None else _adapter_bytes(adapted.model, cfg),
        weights=held if cfg.peft is None else held + own,
        gradients=own,
        optimizer=sum(state_bytes(count, cfg.train.optim, size) for count in counts),
        activations=step_bytes(config, _step(cfg, config)),
    )


def _unstarted(cfg: DictConfig) -> DictConfig:
    """Return the config with an adapter that begins as any: its start would need weights."""
    values = plain(cfg) | {"adapter": None}
    if "init_lora_weights" in (values["peft"] or {}):
        values["peft"]["init_lora_weights"] = True
    return OmegaConf.create(values)


def _adapter_bytes(model: Any, cfg: DictConfig) -> int:
    if hasattr(model, "prompt_encoder"):  # its output is saved, and so computed
        model.prompt_encoder.to_empty(device="cpu")
    embeds = any("embed" in name for name in cfg.peft.get("target_modules") or ())
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=embeds)
    count = int(sum(value.numel() for value in tensors.values()))
    return 4 * count * (2 if saved_as_plain_lora(cfg.peft) else 1)  # of twice the rank


def base_bytes(model: Any, quant: Mapping[str, Any] | None) -> int:
    """Return what a model's weights take, quantised as bitsandbytes would.

    Args:
        model: its weights may be on no device.
        quant: the config's section; None: the weights stay as they are.
    """
    tensors = (*model.parameters(), *model.buffers())
    held = int(sum(t.numel() * t.element_size() for t in tensors))
    if quant is None:
        return held
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    for name, module in model.named_modules():
        linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if linear and should_convert_module(name, kept):
            weight = module.weight
            held += _packed(weight, quant) - weight.numel() * weight.element_size()
    return held


def _packed(weight_OI: Any, quant: Mapping[str, Any]) -> int:
    """Return a quantised layer's bytes: its weights, and the scales that give them back."""
    count = int(weight_OI.numel())
    if "quant_type" not in quant:
        return count + 4 * len(weight_OI)  # int8, and a scale to each row
    scales = math.ceil(count / BLOCK)
    if quant["double_quant"]:
        return count // 2 + scales + 4 * math.ceil(scales / OUTER_BLOCK)
    return count // 2 + 4 * scales


def tokens(cfg: DictConfig, config: Any) -> int:
    """Return how many tokens a step has at most, all its rows together."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1024
    longest = min(cfg.algorithm.args.get("max_length") or 1024, context)
    answers = 2 if cfg.algorithm.shape == "preference" else 1
    return int(longest * answers * cfg.train.per_device_train_batch_size)


def _step(cfg: DictConfig, config: Any) -> Step:
    args, train = cfg.algorithm.args, cfg.train
    rows, count = train.per_device_train_batch_size, tokens(cfg, config)
    smoothing = train.get("label_smoothing_factor") or args.get("label_smoothing_factor")
    tiled = is_tiled(cfg.algorithm.trainer._target_, smoothing)
    answer = args.get("max_completion_length")
    evaluated = max(rows, train.per_device_eval_batch_size)
    parts = args.get("steps_per_generation") or train.gradient_accumulation_steps
    asked = args.get("generation_batch_size") or rows * parts * (args.get("num_minibatches") or 1)
    classifies = cfg.algorithm.task_type == "SEQ_CLS"
    return Step(
        tokens=count,
        scored=0 if classifies else scored_tokens(count, tiled, answer, evaluated),
        tiled=tiled,
        sampled=asked * count // rows if answer is not None else 0,
        checkpointing=train.gradient_checkpointing,
    )


def _measured(cfg: DictConfig) -> dict[str, Any]:
    """Return the peak of the newest run that computed the same, alone in its process."""
    wanted = fingerprint(cfg)
    files = [*Path("outputs").glob("*/*/run.json"), *Path("multirun").glob("*/*/*/run.json")]
    for path in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with suppress(ValueError, KeyError):  # a record that was cut off, or has no peak yet
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["fingerprint"] == wanted and record["place"] == "alone":
                peak = int(record["metrics"]["peak_bytes"])
                return {"measured": peak, "run": str(path.parent)}
    return {"measured": None, "run": None}
