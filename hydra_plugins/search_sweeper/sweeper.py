"""The sweeper's class for Hydra; its code is in `_core`, which Hydra imports only to sweep."""

from __future__ import annotations

from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.search_sweeper import config as config  # registers the option


class SearchSweeper(Sweeper):
    """Proposes trials in batches, launches each, and learns from its results."""

    hydra_context: HydraContext
    launcher: Launcher

    def __init__(self, **section: Any) -> None:
        """Store `hydra.sweeper`, which is checked when the space is known."""
        self.section = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in section.items()
        }

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store the arguments for a sweep, and make the launcher."""
        from hydra.core.plugins import Plugins

        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run the search and return the results of the jobs that were launched."""
        from hydra_plugins.search_sweeper._core import sweep

        return sweep(self, arguments)
