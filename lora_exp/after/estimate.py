"""The parameters and memory of a run, computed from its model's config without weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig

from lora_exp.adapter.attach import attach
from lora_exp.adapter.stacks import EXPERTS, check_in_floats
from lora_exp.after.base_bytes import base_bytes, dequantised_bytes, stacks_in_4_bits
from lora_exp.config.door import CONF, plain
from lora_exp.config.initialization import saved_as_plain_lora
from lora_exp.config.pairs import QUANTISATIONS
from lora_exp.config.processes import divided, process_count
from lora_exp.config.settled import fingerprint
from lora_exp.config.sharding import sharding, shares_all
from lora_exp.config.validation import validate
from lora_exp.errors import ConfigError
from lora_exp.files.paths import asset
from lora_exp.model.loading import Base, attention_of, unloadable
from lora_exp.model.precision import dtype_of
from lora_exp.model.prequantised import saved_form
from lora_exp.model.requirement import (
    Step,
    is_tiled,
    known_moments,
    scored_tokens,
    state_bytes,
    step_bytes,
)
from lora_exp.model.text_part import class_of
from lora_exp.record.progress import quiet

COMPARED = ("none", "nf4", "int8")  # options of conf/quant


@dataclass(frozen=True)
class Need:
    """What training needs, in bytes."""

    trainable: int  # parameters
    saved: int  # size of the adapter's file, or of the model's
    weights: int  # of the base and the adapter
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The memory of all parts together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """Return what a config needs, also with other quantisations and with every weight trained.

    Args:
        cfg: from `compose`.

    Returns:
        What is common to all, and `rows`, fit for JSON: the numbers of `Need`, `total`, and
        `measured` and `run` if outputs/ or multirun/ has such a run; or why it is `refused`.

    Raises:
        ConfigError: the model's config cannot be loaded.
        TargetError: the config adapts modules that the model does not have.
    """
    quiet()
    config = model_config(cfg)
    cfg = as_saved(cfg, config)
    rows = [_row(variant, config, variant is cfg) for variant in _variants(cfg)]
    return {
        "name": cfg.name,
        "model": cfg.model.path,
        "parameters": sum(p.numel() for p in skeleton(cfg, config).parameters()),
        "tokens": tokens(cfg, config),
        "optimizer": cfg.train.optim,
        "optimizer_known": known_moments(cfg.train.optim) is not None,
        "rows": rows,
    }


def as_saved(cfg: DictConfig, config: Any) -> DictConfig:
    """Return the config with the quantisation that its base was saved with."""
    form = saved_form(config)
    if form is None or form.method not in QUANTISATIONS or cfg.quant is not None:
        return cfg
    return _changed(cfg, {"quant": form.method}, quant=_quant_node(form.method))


def _variants(cfg: DictConfig) -> Iterator[DictConfig]:
    """Yield the config itself, and the ones to compare it with."""
    if cfg.choices.quant not in COMPARED:
        yield cfg
    for quant in COMPARED:
        if quant == cfg.choices.quant:
            yield cfg
        else:
            yield _changed(cfg, {"quant": quant}, quant=_quant_node(quant))
    if cfg.peft is not None:
        model = plain(cfg.model) | {"dtype": "float32"}  # as in conf/peft/none.yaml
        choices = {"quant": "none", "peft": "none"}
        yield _changed(cfg, choices, quant=None, peft=None, adapter=None, model=model)


def _quant_node(option: str) -> Any:
    """Return an option of conf/quant; None: no quantisation. Only 4-bit types differ in size."""
    if option == "none":
        return None
    node = OmegaConf.load(CONF / "quant" / f"{'nf4' if option == 'fp4' else option}.yaml")
    return node


def _changed(cfg: DictConfig, choices: dict[str, str], **sections: Any) -> DictConfig:
    values = plain(cfg) | sections | {"choices": plain(cfg.choices) | choices}
    changed: DictConfig = OmegaConf.create(values)
    return changed


def _row(cfg: DictConfig, config: Any, chosen: bool) -> dict[str, Any]:
    options = {"peft": cfg.choices.peft, "quant": cfg.choices.quant, "chosen": chosen}
    try:
        validate(cfg)
    except ConfigError as error:
        return options | {"refused": error.faults[0][1]}
    form = saved_form(config)
    if form is not None and not form.dequantised and cfg.choices.quant != form.method:
        return options | {"refused": f"the base was saved as {form.method}"}
    try:
        needed = need(cfg, config)
    except ConfigError as error:
        if error.faults[0][0] != EXPERTS:
            raise
        return options | {"refused": error.faults[0][1]}
    return options | asdict(needed) | {"total": needed.total} | _measured(cfg)


def model_config(cfg: DictConfig) -> Any:
    """Load the config of a run's model.

    Raises:
        ConfigError: the path has no config.
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
    """Return the model of a config without its weights: names, shapes and dtypes.

    Raises:
        ConfigError: transformers has no class for it, or not with this attention.
    """
    try:
        with torch.device("meta"):
            return class_of(config, cfg.algorithm.task_type).from_config(
                config,
                dtype=dtype_of(cfg.model.dtype),
                attn_implementation=attention_of(cfg.model.attn_implementation),
                trust_remote_code=cfg.model.trust_remote_code,
            )
    except ValueError as error:
        raise unloadable(cfg.model.path, error, cfg.model.attn_implementation) from error


def need(cfg: DictConfig, config: Any) -> Need:
    """Return what a run, or each of its processes, needs.

    Args:
        cfg: of the run.
        config: of its model.

    Raises:
        TargetError: the config adapts modules that the model does not have.
        ConfigError: it adapts experts that are in 4 bits.
    """
    if several := process_count(cfg) > 1:
        cfg = _changed(cfg, {}, train=plain(cfg.train) | (divided(cfg) or {}))
    model = skeleton(cfg, config)
    frozen_bytes, dequantised = base_bytes(model, cfg.quant), dequantised_bytes(model, cfg.quant)
    in_4_bits = stacks_in_4_bits(model, cfg.quant)
    skeleton_base = Base(model, None, cfg.model.path, None)
    adapted = attach(skeleton_base, _without_initialization(cfg), Path())
    if cfg.peft is not None:  # the skeleton's weights are floats, those of a run may not be
        parameters = getattr(adapted.model.peft_config["default"], "target_parameters", None)
        check_in_floats(parameters or (), in_4_bits)
    trained = [p for p in adapted.model.parameters() if p.requires_grad]
    # an adapter trains in float32, whatever the base's dtype
    size = 4 if cfg.peft is not None else dtype_of(cfg.model.dtype).itemsize
    counts = [p.numel() for p in trained]
    trained_bytes = size * sum(counts)
    parts = process_count(cfg)
    of_state = parts if shares_all(cfg) or sharding(cfg) == "zero2" else 1
    of_weights = parts if shares_all(cfg) else 1
    copies = 2 if several and of_state == 1 else 1  # of gradients: one of them is averaged
    weights = frozen_bytes if cfg.peft is None else frozen_bytes + trained_bytes
    return Need(
        trainable=sum(counts),
        saved=trained_bytes if cfg.peft is None else _adapter_bytes(adapted.model, cfg),
        weights=weights // of_weights,
        gradients=trained_bytes * copies // of_state,
        optimizer=sum(state_bytes(n, cfg.train.optim, size) for n in counts) // of_state,
        activations=step_bytes(config, _step(cfg, config)) + dequantised,
    )


def _without_initialization(cfg: DictConfig) -> DictConfig:
    """Return the config with default initialization of the adapter: others may need the weights."""
    values = plain(cfg) | {"adapter": None}
    values["model"] = values["model"] | {"add_tokens": []}  # a few rows, and no tokenizer is here
    if "init_lora_weights" in (values["peft"] or {}):
        values["peft"]["init_lora_weights"] = True
    return OmegaConf.create(values)


def _adapter_bytes(model: Any, cfg: DictConfig) -> int:
    if hasattr(model, "prompt_encoder"):  # its output is saved, so it is computed
        model.prompt_encoder.to_empty(device="cpu")
    embeds = any("embed" in name for name in cfg.peft.get("target_modules") or ())
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=embeds)
    count = int(sum(value.numel() for value in tensors.values()))
    return 4 * count * (2 if saved_as_plain_lora(cfg.peft) else 1)  # saved with twice the rank


def tokens(cfg: DictConfig, config: Any) -> int:
    """Return how many tokens a step has at most, in all its rows together."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1024
    longest = min(cfg.algorithm.args.get("max_length") or 1024, context)
    sequences = 2 if cfg.algorithm.shape == "preference" else 1  # to a row
    return int(longest * sequences * cfg.train.per_device_train_batch_size)


def _step(cfg: DictConfig, config: Any) -> Step:
    args, train = cfg.algorithm.args, cfg.train
    rows, count = train.per_device_train_batch_size, tokens(cfg, config)
    smoothing = train.get("label_smoothing_factor") or args.get("label_smoothing_factor")
    tiled = is_tiled(cfg.algorithm.trainer._target_, smoothing)
    max_answer = args.get("max_completion_length")
    eval_rows = max(rows, train.per_device_eval_batch_size)
    steps = args.get("steps_per_generation") or train.gradient_accumulation_steps
    prompts = args.get("generation_batch_size") or rows * steps * (args.get("num_minibatches") or 1)
    is_classifier = cfg.algorithm.task_type == "SEQ_CLS"
    return Step(
        tokens=count,
        scored=0 if is_classifier else scored_tokens(count, tiled, max_answer, eval_rows),
        tiled=tiled,
        sampled=prompts * count // rows if max_answer is not None else 0,
        checkpointing=train.gradient_checkpointing,
    )


def _measured(cfg: DictConfig) -> dict[str, Any]:
    """Return the peak memory of the newest run with this fingerprint, alone in its process."""
    own_fingerprint = fingerprint(cfg)
    files = [*Path("outputs").glob("*/*/run.json"), *Path("multirun").glob("*/*/*/run.json")]
    for path in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        with suppress(ValueError, KeyError):  # an incomplete record
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["fingerprint"] == own_fingerprint and record["place"] == "alone":
                peak = int(record["metrics"]["peak_bytes"])
                return {"measured": peak, "run": str(path.parent)}
    return {"measured": None, "run": None}
