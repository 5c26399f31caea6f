"""A job as Hydra's launchers run it, and its result. Needs no torch."""

from __future__ import annotations

import logging
import pickle
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf

from lora_exp.config.door import hidden


def run_in_pack(config: DictConfig, task: TaskFunction) -> JobReturn:
    """Run a job as `hydra.core.utils.run_job` does, with half as many copies of its config.

    It leaves out what jobs of a pack do not have: a directory, an environment and callbacks of
    their own in the process. The launcher has written the output directory into the config.

    Args:
        config: as composed, with `hydra`.
        task: what runs the job.
    """
    instance: Any = HydraConfig.instance()
    before, hydra = instance.cfg, config.hydra
    instance.set_config(config)
    try:
        Path(hydra.runtime.output_dir).mkdir(parents=True, exist_ok=True)
        result = returned(config, None)
        configure_log(hydra.job_logging, hydra.verbose)
        if hydra.output_subdir is not None:
            folder = Path(hydra.runtime.output_dir) / hydra.output_subdir
            folder.mkdir(parents=True, exist_ok=True)
            parts = {"config": result.cfg, "hydra": result.hydra_cfg}
            for name, part in (parts | {"overrides": hydra.overrides.task}).items():
                (folder / f"{name}.yaml").write_text(OmegaConf.to_yaml(part), encoding="utf-8")
        try:
            result.return_value = task(result.cfg)
        except Exception as error:
            result.return_value, result.status = error, JobStatus.FAILED
        for handler in logging.getLogger().handlers:
            handler.flush()
        return result
    finally:
        instance.cfg = before


class Result(JobReturn):
    """A job's result. Its configs are made when they are asked for: those of many fill memory."""

    def __init__(self, config: DictConfig, value: Any, status: JobStatus) -> None:
        """Create what Hydra's `run_job` returns.

        Args:
            config: as composed, with `hydra`.
            value: what the job returned or raised.
            status: which of both.
        """
        self._cfg = _pickled(config, "hydra")
        self._hydra_cfg = _pickled(config, *(str(key) for key in config if key != "hydra"))
        self.overrides = list(config.hydra.overrides.task)
        self.working_dir, self.task_name = str(Path.cwd()), config.hydra.job.name
        self.return_value, self.status = value, status

    @cached_property
    def cfg(self) -> DictConfig:  # type: ignore[override]
        """The config without `hydra`."""
        return pickle.loads(self._cfg)  # type: ignore[no-any-return]

    @cached_property
    def hydra_cfg(self) -> DictConfig:  # type: ignore[override]
        """The section `hydra` alone."""
        return pickle.loads(self._hydra_cfg)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a launcher gets of a worker: configs as the task has left them, as bytes."""
        state, names = vars(self).copy(), ("cfg", "hydra_cfg")
        changed = {f"_{name}": pickle.dumps(state.pop(name)) for name in names if name in state}
        return state | changed


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a copy of a composed config without the `hydra` section."""
    return pickle.loads(_pickled(config, "hydra"))  # type: ignore[no-any-return]


def _pickled(config: DictConfig, *keys: str) -> bytes:
    """Return a config without sections; pickle is many times faster than omegaconf's copies."""
    with hidden(config, *keys) as rest:
        return pickle.dumps(rest)


def failed(config: DictConfig, error: BaseException) -> JobReturn:
    """Return the result of a job that ended before Hydra could return one."""
    return Result(config, error, JobStatus.FAILED)


def returned(config: DictConfig, value: Any) -> JobReturn:
    """Return the result of a job that Hydra has not run."""
    return Result(config, value, JobStatus.COMPLETED)
