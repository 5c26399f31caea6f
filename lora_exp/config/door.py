"""The one door to `_target_`: what may be imported, what it was called before, and the call.

Only this module knows `instantiate`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.signature import functions, signature
from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.files.paths import PACKAGE, is_path

CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())

# what configs of runs before the rooms call our own -> what it is called now
RENAMED = {
    "lora_exp.model.load": "lora_exp.model.loading.load",
    "lora_exp.model.bnb_4bit": "lora_exp.model.loading.bnb_4bit",
    "lora_exp.model.bnb_8bit": "lora_exp.model.loading.bnb_8bit",
    "lora_exp.data.jsonl": "lora_exp.data.rows.jsonl",
    "lora_exp.data.hub": "lora_exp.data.rows.hub",
    "lora_exp.data.corpus": "lora_exp.data.rows.corpus",
    "lora_exp.data.pairs": "lora_exp.data.rows.pairs",
    "lora_exp.ppo.PPOTrainer": "lora_exp.algorithm.ppo.PPOTrainer",
    "lora_exp.ppo.PPOConfig": "lora_exp.algorithm.ppo.PPOConfig",
    "lora_exp.seq2seq.Seq2SeqTrainer": "lora_exp.algorithm.seq2seq.Seq2SeqTrainer",
    "lora_exp.seq2seq.Seq2SeqConfig": "lora_exp.algorithm.seq2seq.Seq2SeqConfig",
    "lora_exp.tracking.Wandb": "lora_exp.tracking.wandb.Wandb",
}


def renamed(values: Any, names: Mapping[str, str] = RENAMED) -> Any:
    """Return nested dicts and lists with every `_target_` of an old name under its new one.

    Args:
        values: a config, or a part of one.
        names: old name -> new name.
    """
    if isinstance(values, Mapping):
        return {
            key: names.get(item, item)
            if key == "_target_" and isinstance(item, str)
            else renamed(item, names)
            for key, item in values.items()
        }
    return [renamed(item, names) for item in values] if isinstance(values, list) else values


def first_named(values: Any) -> Any:
    """Return nested dicts and lists with every `_target_` under the name that it had first.

    A run is known again by the hash of its config, whatever its parts are called meanwhile.
    """
    return renamed(values, {new: old for old, new in RENAMED.items()})


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as nested dicts and lists."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


@cache
def shipped_targets() -> frozenset[str]:
    """Return every `_target_` of our own conf/."""
    found = re.compile(r"_target_:\s*([\w.]+)")
    return frozenset(t for path in CONF.rglob("*.yaml") for t in found.findall(path.read_text()))


def is_trusted(target: str, trusted: Iterable[str] = ()) -> bool:
    """Say whether a `_target_` may be imported: shipped, defined in lora_exp, or named by the user.

    Names that lora_exp merely imports (`lora_exp.config.settled.json.loads`) are not its own.
    """
    if target in shipped_targets() or target in set(trusted):
        return True
    found = signature(target) if target.startswith("lora_exp.") else None
    return found is not None and found.module.split(".")[0] == "lora_exp"


def every_target(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and value of every `_target_` in a config, however deep."""
    children = node.items() if isinstance(node, Mapping) else enumerate(node)
    for name, child in children:
        if name == "_target_":
            yield key, child
        elif isinstance(child, Mapping | list | tuple):
            yield from every_target(child, f"{key}.{name}" if key else str(name))


def untrusted(cfg: DictConfig) -> list[tuple[str, str]]:
    """Return a fault for each `_target_` that may not be imported."""
    named = [(f"{key}._target_", target) for key, target in every_target(plain(cfg))]
    listed = OmegaConf.select(cfg, "algorithm.rewards", throw_on_missing=False) or ()
    if isinstance(listed, str):
        return [("algorithm.rewards", f"is a list; algorithm.rewards=[{listed}]")]
    rewards = [(f"algorithm.rewards.{i}", r) for i, r in enumerate(listed) if isinstance(r, str)]
    named += [(key, name) for key, name in rewards if not is_path(name)]
    return [
        (key, _distrust(target) + (_near_reward(target) if "rewards" in key else ""))
        for key, target in named
        if not (isinstance(target, str) and is_trusted(target, cfg.trusted_targets))
    ]


def _distrust(target: Any) -> str:
    if str(target).startswith("lora_exp."):
        return f"{target!r} is not trusted: nothing of that name is lora_exp's own"
    return f"{target!r} is not trusted; to run it, add trusted_targets=[{target}]"


def _near_reward(name: Any) -> str:
    if "." in str(name) and not str(name).startswith("lora_exp."):
        return ""
    own = functions("lora_exp.rewards")
    return did_you_mean(f"lora_exp.rewards.{str(name).rpartition('.')[2]}", own, 1)


def build(
    cfg: DictConfig, key: str, through: Callable[[Any], Any] | None = None, **runtime: Any
) -> Any:
    """Call the `_target_` at a key with the YAML's values and Python's objects.

    Two steps, since `instantiate` would copy keyword objects into an OmegaConf tree.

    Args:
        cfg: the run's.
        key: of the node.
        through: makes of the target what is called in its place.
        runtime: the objects.

    Returns:
        What the target returns, or None where the key holds null (`quant=none`).

    Raises:
        ConfigError: the target may not be imported.
    """
    from hydra.utils import instantiate

    node = OmegaConf.select(cfg, key)
    if node is None:
        return None
    faults = [fault for fault in untrusted(cfg) if fault[0].startswith(key)]
    if faults:
        raise ConfigError(faults)
    made = instantiate(node, _partial_=True, _convert_="all")
    call = partial(through(made.func), *made.args, **made.keywords) if through else made
    return call(**runtime)
