"""A job as Hydra's launchers run it, and its result. Needs no torch."""

from __future__ import annotations

import logging
import pickle
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


def without_hydra(config: DictConfig) -> DictConfig:
    """Return a copy of a composed config without the `hydra` section."""
    return _without(config, "hydra")


def _without(config: DictConfig, *keys: str) -> DictConfig:
    """Return a copy without sections, by pickle: many times faster than omegaconf's own copies."""
    with hidden(config, *keys) as rest:
        return pickle.loads(pickle.dumps(rest))  # type: ignore[no-any-return]


def failed(config: DictConfig, error: BaseException) -> JobReturn:
    """Return the result of a job that ended before Hydra could return one."""
    return returned(config, error, JobStatus.FAILED)


def returned(config: DictConfig, value: Any, status: JobStatus = JobStatus.COMPLETED) -> JobReturn:
    """Return the result of a job that Hydra has not run."""
    result = JobReturn()
    result.cfg = without_hydra(config)
    result.hydra_cfg = _without(config, *(str(key) for key in config if key != "hydra"))
    result.overrides = list(config.hydra.overrides.task)
    result.working_dir, result.task_name = str(Path.cwd()), config.hydra.job.name
    result.return_value, result.status = value, status
    return result
