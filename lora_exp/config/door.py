"""Everything about `_target_`: what may be imported, its former names, and the call.

Only this module uses `instantiate`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.signature import functions, signature
from lora_exp.errors import ConfigError, did_you_mean
from lora_exp.files.paths import PACKAGE, is_path

CONF = next(path for path in (PACKAGE / "conf", PACKAGE.parent / "conf") if path.is_dir())

# names in configs of runs from before the rooms -> names now
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
    """Return nested dicts and lists in which each `_target_` with an old name has its new one.

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


def with_oldest_names(values: Any) -> Any:
    """Return nested dicts and lists in which each `_target_` has its oldest name.

    A run is recognised by the hash of its config, also after targets were renamed.
    """
    return renamed(values, {new: old for old, new in RENAMED.items()})


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as nested dicts and lists."""
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


@contextmanager
def hidden(cfg: DictConfig, *keys: str) -> Iterator[DictConfig]:
    """Hide sections of a config: a copy without them takes a thousand times as long."""
    content: Any = cfg._content
    cfg.__dict__["_content"] = {key: node for key, node in content.items() if key not in keys}
    try:
        yield cfg
    finally:
        cfg.__dict__["_content"] = content


class Section(dict[str, Any]):
    """Nested values whose keys are attributes, too, as a DictConfig's, in a hundredth of the time.

    For checks that read many values of each of a sweep's jobs.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


def sections(values: Any) -> Any:
    """Return nested values with their dicts as sections."""
    if isinstance(values, dict):
        return Section({key: sections(value) for key, value in values.items()})
    return [sections(value) for value in values] if isinstance(values, list) else values


def selected(values: Any, key: str) -> Any:
    """Return what nested values hold under a dotted key; None: there is nothing."""
    for part in key.split("."):
        if isinstance(values, (list, tuple)):
            values = values[int(part)]
        else:
            values = values.get(part) if isinstance(values, dict) else None
    return values


@cache
def shipped_targets() -> frozenset[str]:
    """Return every `_target_` of our own conf/."""
    pattern = re.compile(r"_target_:\s*([\w.]+)")
    return frozenset(t for path in CONF.rglob("*.yaml") for t in pattern.findall(path.read_text()))


def is_trusted(target: str, trusted: Iterable[str] = ()) -> bool:
    """Return whether a `_target_` may be imported.

    It may be if it is shipped, defined in lora_exp, or trusted by the user. Names that lora_exp
    only imports (`lora_exp.config.settled.json.loads`) are not its own.
    """
    if target in shipped_targets() or target in set(trusted):
        return True
    definition = signature(target) if target.startswith("lora_exp.") else None
    return definition is not None and definition.module.split(".")[0] == "lora_exp"


def every_target(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key and value of every `_target_` in nested values, at any depth.

    Raises:
        TypeError: these are no plain dicts and lists, so targets might be passed over.
    """
    if not isinstance(node, (dict, list, tuple)):
        raise TypeError(f"{type(node).__name__} is neither a dict nor a list")
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for name, child in children:
        if name == "_target_":
            yield key, child
        elif isinstance(child, (dict, list, tuple)):
            yield from every_target(child, f"{key}.{name}" if key else str(name))


def untrusted(values: dict[str, Any], section: str = "") -> list[tuple[str, str]]:
    """Return a fault for each `_target_` that may not be imported.

    Args:
        values: those of the run's config.
        section: the key of the only node whose targets are wanted, beside the rewards.
    """
    node = selected(values, section) if section else values
    targets = [(f"{key}._target_", target) for key, target in every_target(node, section)]
    rewards = selected(values, "algorithm.rewards") or ()
    if isinstance(rewards, str):
        return [("algorithm.rewards", f"is a list; algorithm.rewards=[{rewards}]")]
    reward_names = [
        (f"algorithm.rewards.{i}", r) for i, r in enumerate(rewards) if isinstance(r, str)
    ]
    targets += [(key, name) for key, name in reward_names if not is_path(name)]
    return [
        (key, _distrust_text(target) + (_reward_hint(target) if "rewards" in key else ""))
        for key, target in targets
        if not (isinstance(target, str) and is_trusted(target, values["trusted_targets"]))
    ]


def _distrust_text(target: Any) -> str:
    if str(target).startswith("lora_exp."):
        return f"{target!r} is not trusted: lora_exp defines nothing of that name"
    return f"{target!r} is not trusted; to run it, add trusted_targets=[{target}]"


def _reward_hint(name: Any) -> str:
    if "." in str(name) and not str(name).startswith("lora_exp."):
        return ""
    known = functions("lora_exp.rewards")
    return did_you_mean(f"lora_exp.rewards.{str(name).rpartition('.')[2]}", known, 1)


def build(
    cfg: DictConfig,
    key: str,
    through: Callable[[Any], Any] | None = None,
    leave_out: Iterable[str] = (),
    **runtime: Any,
) -> Any:
    """Call the `_target_` at a key with the arguments from YAML and objects made at run time.

    Done in two steps, since `instantiate` would copy keyword objects into an OmegaConf tree.

    Args:
        cfg: the run's config.
        key: the key of the node.
        through: wraps the target; the result is called in its place.
        leave_out: keys of the node that are no arguments.
        runtime: the objects, as keyword arguments.

    Returns:
        What the target returns, or None if the key holds null (`quant=none`).

    Raises:
        ConfigError: the target may not be imported.
    """
    from hydra.utils import instantiate

    node = OmegaConf.select(cfg, key)
    if node is None:
        return None
    faults = [fault for fault in untrusted(plain(cfg), key) if fault[0].startswith(key)]
    if faults:
        raise ConfigError(faults)
    arguments = {name: value for name, value in node.items() if name not in set(leave_out)}
    target = instantiate(OmegaConf.create(arguments), _partial_=True, _convert_="all")
    call = partial(through(target.func), *target.args, **target.keywords) if through else target
    return call(**runtime)
