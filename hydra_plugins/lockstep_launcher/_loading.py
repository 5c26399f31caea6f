"""Hydra's config loader for sweeps: it composes the groups once for all jobs with equal choices."""

from __future__ import annotations

import pickle
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


class SweepLoader:
    """A config loader in place of Hydra's, whose other methods it has, too.

    Hydra reads and merges all files anew for each job. Here this is done once for each combination
    of options, and a job's values are set in a copy, by Hydra's own function and in its order.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._groups: dict[str, bool] = {}
        self._parsed: dict[str, Override] = {}
        self._composed: dict[tuple[str, ...], bytes] = {}  # to unpickle is faster than to copy
        self._validated: dict[tuple[str, ...], DictConfig] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: list[str]
    ) -> DictConfig:
        """Return what Hydra's own loader returns; sweepers validate by this what they will launch.

        Raises:
            HydraException: overrides that cannot be applied.
        """
        config = self._load(master_config, sweep_overrides)
        self._validated[tuple(sweep_overrides)] = config
        return config

    def job(self, master_config: DictConfig, overrides: list[str]) -> DictConfig:
        """Return the config of a job to launch: as it was validated, or composed now.

        Raises:
            HydraException: overrides that cannot be applied.
        """
        validated = self._validated.pop(tuple(overrides), None)
        return self._load(master_config, overrides) if validated is None else validated

    def _load(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        parsed = [self._parse(override) for override in sweep_overrides]
        if any(o.is_sweep_override() or o.is_hydra_override() for o in parsed):
            return self._by_hydra(master_config, sweep_overrides)
        config: DictConfig = pickle.loads(self._with_choices(master_config, parsed))
        try:
            ConfigLoaderImpl._apply_overrides_to_config(
                [o for o in parsed if not self._is_choice(o)], config
            )
        except HydraException:
            return self._by_hydra(master_config, sweep_overrides)  # its message names more
        job = config.hydra.job
        config.hydra.overrides.task = [o.input_line for o in parsed]
        job.override_dirname = get_overrides_dirname(parsed, **job.config.override_dirname)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    def _parse(self, override: str) -> Override:
        if override not in self._parsed:
            self._parsed[override] = OverridesParser.create().parse_overrides([override])[0]
        return self._parsed[override]

    def _by_hydra(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        config: DictConfig = self._loader.load_sweep_config(master_config, sweep_overrides)
        return config

    def _with_choices(self, master_config: DictConfig, parsed: list[Override]) -> bytes:
        """Return the pickled config with a job's options, and no values of its own."""
        hydra = master_config.hydra
        choices = [str(o.input_line) for o in parsed if self._is_choice(o)]
        general: Any = OmegaConf.to_container(hydra.overrides.hydra)  # with interpolations as texts
        overrides = [*general, *choices]
        key = (str(hydra.job.config_name), *overrides)
        if key not in self._composed:
            config = self._loader.load_configuration(hydra.job.config_name, overrides, RunMode.RUN)
            self._composed[key] = pickle.dumps(config)
        return self._composed[key]

    def _is_choice(self, override: Override) -> bool:
        """Return whether an override chooses an option of a group; one with a dict sets values."""
        name = override.key_or_group
        if name not in self._groups:
            self._groups[name] = bool(self._loader.repository.group_exists(name))
        return self._groups[name] and not isinstance(override.value(), dict)
