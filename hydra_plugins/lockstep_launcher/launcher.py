"""The launcher's class for Hydra; its code is in `_core`, which Hydra imports only to launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.lockstep_launcher import config as config  # registers the option


class LockstepLauncher(Launcher):
    """Plans a sweep and trains it in worker processes; goes on if one dies."""

    def __init__(
        self,
        workers: int | None = None,
        executor: str = "local",
        slurm: Mapping[str, Any] | None = None,
        ray: Mapping[str, Any] | None = None,
    ) -> None:
        """Store `hydra.launcher`.

        Args:
            workers: processes that train at once, or Slurm jobs, or Ray tasks; None: one a GPU,
                without a GPU one; on a cluster one a pack or job alone.
            executor: `local`, `slurm` or `ray`.
            slurm: of a Slurm job; see `SlurmConfig`.
            ray: of a Ray task; see `RayConfig`.
        """
        self.workers, self.executor = workers, executor
        self.engines = {"slurm": slurm or {}, "ray": ray or {}}
        self.keeps_workers = False
        self.kept: Any = None  # `Workers` of the latest launch

    @contextmanager
    def keeping_workers(self) -> Iterator[None]:
        """Keep the workers between launches: a search launches several times."""
        self.keeps_workers = True
        try:
            yield
        finally:
            self.keeps_workers = False
            if self.kept is not None:
                self.kept.stop()
                self.kept = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Store the arguments for a launch, and let Hydra compose its jobs faster."""
        from hydra_plugins.lockstep_launcher._loading import SweepLoader

        loader: Any = hydra_context.config_loader
        if not isinstance(loader, SweepLoader):
            loader = SweepLoader(loader)
        hydra_context.config_loader = loader
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs and return their results, in their order."""
        from hydra_plugins.lockstep_launcher._core import launch

        return launch(self, job_overrides, initial_job_idx)
