"""A config composed from groups and overrides, in Python as on the command line."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from lora_exp.config.door import CONF
from lora_exp.config.mistakes import mistake
from lora_exp.config.settled import settle
from lora_exp.config.validation import validate
from lora_exp.errors import ConfigError


def compose(*overrides: str, config_dir: str | Path | None = None) -> DictConfig:
    """Compose, settle and validate a run's config, as the command line would.

    Args:
        overrides: what would follow `python run.py`, such as `"peft.r=8"`.
        config_dir: a folder with options of your own.

    Raises:
        ConfigError: an override that names no option or key, or every fault of the config.
    """
    if config_dir and not Path(config_dir).is_dir():
        raise ConfigError([("--config-dir", f"{config_dir} is no folder")])
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            own = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
            full = hydra.compose("config", [*own, *overrides], return_hydra_config=True)
    except Exception as error:
        if (ours := mistake(error)) is None:
            raise
        raise ours from error
    choices = OmegaConf.to_container(full.hydra.runtime.choices)
    with open_dict(full):
        del full["hydra"]
    return validate(settle(full, dict(choices), overrides))  # type: ignore[arg-type]
