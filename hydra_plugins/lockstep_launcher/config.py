"""The launcher's place in Hydra's `hydra/launcher` group."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore


@dataclass
class LockstepConfig:
    """It takes no settings: how jobs share a base is the run's own `lockstep` section."""

    _target_: str = "hydra_plugins.lockstep_launcher.launcher.LockstepLauncher"


ConfigStore.instance().store(
    group="hydra/launcher", name="lockstep", node=LockstepConfig, provider="lora-exp"
)
