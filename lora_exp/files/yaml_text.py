"""Plain values as YAML, in the bytes of OmegaConf.to_yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf._utils import get_omega_conf_dumper


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return nested dicts and lists as YAML.

    `OmegaConf.to_yaml` makes a config of them first, which takes three times as long.
    """
    text: str = yaml.dump(
        values,
        default_flow_style=False,
        allow_unicode=True,
        sort_keys=False,
        Dumper=get_omega_conf_dumper(),
    )
    return text
