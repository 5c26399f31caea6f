"""The launcher as Hydra sees it; the work is in `_core`, which Hydra does not import to list it."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.lockstep_launcher import config as config  # registers the option


class LockstepLauncher(Launcher):
    """Plans a sweep, trains it in a worker process, and stays alive whatever becomes of that."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what a launch needs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs and return their results, in their order."""
        from hydra_plugins.lockstep_launcher._core import launch

        return launch(self, job_overrides, initial_job_idx)
