"""Rows of the embeddings that an adapter trains: those of added tokens, and of tokens by number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from transformers import AutoTokenizer

from lora_exp.errors import AdapterError, ConfigError
from lora_exp.model.loading import Base
from lora_exp.model.vocabulary import grow

ADDED = "model.add_tokens"


def added_rows(base: Base, cfg: DictConfig) -> dict[str, list[int]]:
    """Return peft's `trainable_token_indices` for the tokens that the config adds; {}: none.

    Rows of the output layer are trained, too: peft does so itself where the two are tied.

    Raises:
        ConfigError: the embeddings are trained in another way already, or cannot be by rows.
    """
    tokens = list(cfg.model.get("add_tokens") or ())
    if not tokens:
        return {}
    layers = embeddings(base.model)
    for key in ("trainable_token_indices", "modules_to_save", "target_modules"):
        names = cfg.peft.get(key) or ()
        adapts = not isinstance(names, str) and _names_one_of(names, layers)
        if (key == "trainable_token_indices" and names) or adapts:
            text = "trains the new rows itself; leave the embeddings out"
            raise ConfigError([(f"peft.{key}", f"{ADDED} {text}")])
    for name, layer in layers.items():
        if getattr(layer, "bias", None) is not None:
            text = f"{name} of {type(base.model).__name__} has a bias, and peft would leave it out"
            raise ConfigError([(ADDED, f"{text}; train whole: peft=none")])
    ids = base.tokenizer.convert_tokens_to_ids(tokens)
    return dict.fromkeys(layers, ids)


def embeddings(model: Any) -> dict[str, Any]:
    """Return a model's input embedding, and the output layer if the two are not tied, by name."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if last is not None and last.weight is first.weight:
        last = None
    return {name: module for name, module in model.named_modules() if module in (first, last)}


def _names_one_of(names: Any, layers: dict[str, Any]) -> bool:
    return any(f".{layer}".endswith(f".{name}") for name in names for layer in layers)


def trained_rows(config: Any) -> int:
    """Return how many rows the embeddings need for the tokens that an adapter trains; 0: any."""
    return 1 + max(_indices(config), default=-1)


def _indices(config: Any) -> list[int]:
    indices = getattr(config, "trainable_token_indices", None) or ()
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return [index for ids in lists for index in ids]


def check_tokens(config: Any, base: Base, cfg: DictConfig) -> None:
    """Refuse to train an adapter further if its added tokens are not those of the tokenizer.

    Raises:
        ConfigError: `model.add_tokens` is not that of its run.
    """
    missing = trained_rows(config) - len(base.tokenizer)
    if missing > 0:
        text = f"{cfg.adapter} adds {missing} tokens to its base; give {ADDED} as its run had it"
        raise ConfigError([("adapter", text)])
    tokens = list(cfg.model.get("add_tokens") or ())
    if not tokens:
        return
    ids = base.tokenizer.convert_tokens_to_ids(tokens)
    if not {*ids} <= {*_indices(config)}:
        text = f"{cfg.adapter} does not train them, and a saved adapter gets no new rows; leave out"
        raise ConfigError([(ADDED, text)])
    folder = Path(cfg.adapter).expanduser()
    if not (folder / "tokenizer_config.json").is_file():  # of another program
        return
    saved = AutoTokenizer.from_pretrained(str(folder)).convert_ids_to_tokens(ids)
    if saved != tokens:
        text = f"{cfg.adapter} has {saved} in their place; give these, in this order"
        raise ConfigError([(ADDED, text)])


def make_room(model: Any, config: Any, path: str, apart: bool) -> None:
    """Grow a base's embeddings for the tokens that an adapter adds.

    Args:
        model: the base.
        config: the adapter's.
        path: its folder, for errors.
        apart: whether others share the base.

    Raises:
        AdapterError: others share the base, or it is one of many more tokens.
    """
    needed, rows = trained_rows(config), len(model.get_input_embeddings().weight)
    if needed <= rows:
        return
    if needed > rows + len(_indices(config)):
        text = f"does not fit this base: it trains token {needed - 1} of {rows}"
        raise AdapterError(f"{path} {text}")
    if apart:
        text = f"adds tokens: it needs {needed} embeddings, and its base has {rows}"
        raise AdapterError(f"{path} {text}; merge it alone first, then take the model")
    grow(model, needed)
