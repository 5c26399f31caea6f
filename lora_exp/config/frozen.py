"""A settled config as jobs get it: a DictConfig that cannot be changed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from omegaconf import DictConfig, OmegaConf

# of each shape the values that had it first, and their config: a sweep's jobs differ in few values,
# and to create a config takes many times as long as to unpickle one
_first: dict[Any, tuple[dict[str, Any], bytes]] = {}


def frozen(values: dict[str, Any]) -> DictConfig:
    """Return a settled config's values as a config that cannot be changed."""
    shape = _shape(values)
    if shape not in _first:
        cfg = OmegaConf.create(values)
        OmegaConf.set_struct(cfg, True)
        OmegaConf.set_readonly(cfg, True)
        _first[shape] = copy.deepcopy(values), pickle.dumps(cfg)
    earlier, pickled = _first[shape]
    copied: DictConfig = pickle.loads(pickled)
    _fill(copied, values, earlier)
    return copied


def _shape(values: Any) -> Any:
    """Return the keys of nested values; of a leaf None."""
    if isinstance(values, dict):
        return tuple((key, _shape(value)) for key, value in values.items())
    return (list, *map(_shape, values)) if isinstance(values, list | tuple) else None


def _fill(node: Any, values: Any, earlier: Any) -> None:
    """Set the leaves of a config that differ from the values with which it was created."""
    for key in values if isinstance(values, dict) else range(len(values)):
        value, before = values[key], earlier[key]
        if isinstance(value, dict | list | tuple):
            _fill(node._get_node(key), value, before)
        elif type(value) is not type(before) or value != before:
            node._get_node(key)._val = value
