"""Registers the launcher as an option of Hydra's group `hydra/launcher`."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore


@dataclass
class LockstepConfig:
    """Where packs train; how jobs share a base is set in the run's section `lockstep`."""

    _target_: str = "hydra_plugins.lockstep_launcher.launcher.LockstepLauncher"
    workers: int | None = None  # processes at once; None: one a GPU, without a GPU one


ConfigStore.instance().store(
    group="hydra/launcher", name="lockstep", node=LockstepConfig, provider="lora-exp"
)
