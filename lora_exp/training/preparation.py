"""What a run has before its trainer: rows, a base with the adapter, tokens."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import set_seed

from lora_exp.adapter.attach import Adapted, attach
from lora_exp.config.sharding import sharding, shares_all
from lora_exp.config.signature import signature
from lora_exp.data.examples import unending
from lora_exp.data.rows import Rows
from lora_exp.data.template import prepare
from lora_exp.data.tokens import Tokens
from lora_exp.errors import ConfigError
from lora_exp.model.loading import Base
from lora_exp.model.packing import keeps_rows_apart
from lora_exp.model.padding import sees_padding
from lora_exp.model.precision import autocast_dtype
from lora_exp.model.sharded import share_layers, share_weights
from lora_exp.model.special_tokens import set_end_tokens
from lora_exp.model.vocabulary import missing_embeddings
from lora_exp.parallel.world import world
from lora_exp.record.contents import input_hashes
from lora_exp.record.run import Record
from lora_exp.training.answers import HeldOut
from lora_exp.training.inputs import Inputs
from lora_exp.training.place import Place


@dataclass(frozen=True)
class Prepared:
    """What there is before a trainer."""

    base: Base
    adapted: Adapted
    rows: Rows
    shaped: Rows  # as the trainer takes them
    data: tuple[Tokens, Tokens | None]  # training, held-out
    measured: HeldOut
    hashes: dict[str, Any]  # of the run's inputs


def prepared(cfg: DictConfig, record: Record, place: Place) -> Prepared:
    """Read the rows, load the base, attach the adapter, and make the tokens; the record begins.

    Raises:
        LoraExpError: config, rows, base or adapter cannot be used.
    """
    inputs = Inputs(cfg, place, record.values["date"])
    rows, shaped = inputs.rows()
    set_seed(cfg.seed)
    world.in_step = sharding(cfg) == "fsdp"
    base = place.base(cfg)
    _check_trainable(cfg, base)
    hashes = _begin(cfg, record, rows, base)
    set_seed(cfg.seed)  # the adapter's initial weights do not depend on who loaded the base
    adapted = with_reference(cfg, attach(base, cfg, record.directory))
    if world.in_step:
        _share_out(cfg, adapted)
        base.model.sees_padding = sees_padding(base.model)
        _check_padding(cfg, base)
    prepare(base.tokenizer, rows.chat_template, date.fromisoformat(record.values["date"]))
    set_end_tokens(base.model, base.tokenizer)
    with world.first_alone():
        data = inputs.tokens(shaped, base, adapted.model)
    rows, shaped = _without_refused(rows, shaped, data, base)
    return Prepared(base, adapted, rows, shaped, data, inputs.held_out(rows, base), hashes)


def with_reference(cfg: DictConfig, adapted: Adapted) -> Adapted:
    """Return a whole model with its untrained copy, where the algorithm's trainer takes one."""
    trainer = signature(cfg.algorithm.trainer._target_)
    if adapted.method or trainer is None or "ref_model" not in trainer.arguments:
        return adapted
    reference = copy.deepcopy(adapted.model).eval().requires_grad_(False)
    return replace(adapted, reference=reference)


def _share_out(cfg: DictConfig, adapted: Adapted) -> None:
    if not shares_all(cfg):
        share_layers(adapted.model)
        return
    asked, dtype = cfg.train.bf16, autocast_dtype(adapted.model, trains_whole=True)
    computed_in = dtype if asked is None else torch.bfloat16 if asked else None
    for model in (adapted.model, adapted.reference):
        if model is not None:
            share_weights(model, computed_in)


def _check_trainable(cfg: DictConfig, base: Base) -> None:
    """Refuse a base that cannot train what the config asks for.

    Raises:
        ConfigError: tokens without an embedding, packed rows that would see each other, or prompts
            that would see their padding.
    """
    if missing := missing_embeddings(base.model, base.tokenizer):
        fix = "resize_token_embeddings of the model, save_pretrained, then train from that folder"
        raise ConfigError([("model.path", f"{cfg.model.path}: {missing}; {fix}")])
    _check_padding(cfg, base)
    args = cfg.algorithm.args
    packs = args.get("packing") and args.get("packing_strategy") != "wrapped"
    if (packs or args.get("padding_free")) and not keeps_rows_apart(base.model):
        key = "packing" if packs else "padding_free"
        name = type(base.model).__name__
        text = f"{name} does not keep rows apart that share a sequence: they would see each other"
        raise ConfigError([(f"algorithm.args.{key}", f"{text}; leave {key} out")])


def _check_padding(cfg: DictConfig, base: Base) -> None:
    if cfg.algorithm.shape == "prompt" and base.model.sees_padding:
        text = f"{type(base.model).__name__} sees the padding of prompts that are answered together"
        raise ConfigError([("algorithm", f"{text}; train it on rows with answers (sft, dpo, kto)")])


def _begin(cfg: DictConfig, record: Record, rows: Rows, base: Base) -> dict[str, Any]:
    """Begin the run's record, and return the hashes of the run's inputs.

    Raises:
        ConfigError: the run resumes, and an input has changed.
    """
    hashes = input_hashes(cfg, rows, base)
    for key, value in hashes.items():
        record.check_unchanged(key, value)
    record.begin()
    return hashes


def _without_refused(
    rows: Rows, shaped: Rows, data: tuple[Tokens, Tokens | None], base: Base
) -> tuple[Rows, Rows]:
    """Return the rows without those that the chat template refuses, and log what is left out."""
    refused = {where: why for tokens in data if tokens for where, why in tokens.refused.items()}
    rows, shaped = rows.without(refused), shaped.without(refused)
    if warning := unending(shaped, base.tokenizer):
        rows = replace(rows, warnings=(*rows.warnings, warning))
    rows.log_skipped()
    return rows, shaped
