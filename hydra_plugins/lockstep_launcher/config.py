"""Registers the launcher as an option of Hydra's group `hydra/launcher`."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore


@dataclass
class SlurmConfig:
    """A Slurm job that trains a pack; what is None is left to Slurm."""

    partition: str | None = None
    account: str | None = None
    time: Any = None  # minutes, or as sbatch reads it
    gpus: Any = None  # 1, or with a type
    cpus: int = 1  # and threads, unless OMP_NUM_THREADS is set
    memory: Any = None
    setup: list[str] = field(default_factory=list)  # lines of the shell before training
    options: Any = None  # a dict of further long options of sbatch
    retries: int = 3  # times in a row that a Slurm job may end without having saved anything


@dataclass
class RayConfig:
    """A Ray task that trains a pack."""

    address: str | None = None  # host:port; None: RAY_ADDRESS, or a cluster of this machine
    cpus: int = 1  # and threads, unless OMP_NUM_THREADS is set
    gpus: int | None = None  # None: 1 if a node has one
    resources: Any = None  # a dict of the cluster's own resources
    retries: int = 3  # times in a row that a task may end without having saved anything


@dataclass
class LockstepConfig:
    """Where packs train; how jobs share a base is set in the run's section `lockstep`."""

    _target_: str = "hydra_plugins.lockstep_launcher.launcher.LockstepLauncher"
    executor: str = "local"  # or slurm, or ray
    # local: processes at once; None: one a GPU, without a GPU one
    # slurm, ray: Slurm jobs or Ray tasks; None: one a pack or job alone
    workers: int | None = None
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    ray: RayConfig = field(default_factory=RayConfig)


ConfigStore.instance().store(
    group="hydra/launcher", name="lockstep", node=LockstepConfig, provider="lora-exp"
)
