"""Compose a config from groups and overrides in Python, as the command line does."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from lora_exp.config.door import CONF
from lora_exp.config.mistakes import translate_error
from lora_exp.config.validation import settle
from lora_exp.errors import ConfigError


def compose(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """Compose, settle and validate a run's config, as the command line would.

    Args:
        overrides: as they would follow `python run.py`, such as `"peft.r=8"`.
        config_dir: a folder with options of your own.

    Raises:
        ConfigError: an override names no option or key, or the config has faults (all are listed).
    """
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError([("--config-dir", f"{config_dir} is no folder")])
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            search_path = (
                [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
            )
            composed = hydra.compose("config", [*search_path, *overrides], return_hydra_config=True)
    except Exception as error:
        if (translated := translate_error(error)) is None:
            raise
        raise translated from error
    choices = OmegaConf.to_container(composed.hydra.runtime.choices)
    with open_dict(composed):
        del composed["hydra"]
    return settle(composed, dict(choices), overrides)  # type: ignore[arg-type]
