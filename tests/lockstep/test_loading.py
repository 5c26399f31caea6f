"""Jobs' configs are composed faster than by Hydra's own loader, and are the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import OmegaConf

from hydra_plugins.lockstep_launcher._loading import SweepLoader

JOBS = [
    ["peft.r=4"],
    ["peft=dora", "peft.r=4", "targets=qv", "+train.neftune_noise_alpha=5"],
    ["experiment=demo_dpo", "train.max_steps=3"],
    ["peft.target_modules=[q_proj,v_proj]", "name='a b'"],
    ["+peft={r: 3}"],
    ["targets=qv", "targets=attention"],
    ["~train.optim"],
    ["hydra.job.num=3"],
    ["peft=none"],
]
MISTAKES = [["peft.rank=4"], ["targets=qvv"], ["~train.nothing"], ["+peft.r=4"], ["++peft=lora"]]


def test_a_jobs_config_is_that_of_hydras_own_loader(loader: Any) -> None:
    arguments = ["peft.r=4,8", "hydra.sweep.subdir=a_${hydra.job.num}"]
    master = loader.load_configuration("config", arguments, RunMode.MULTIRUN)
    fast = SweepLoader(loader)
    for overrides in (*JOBS, *JOBS[::-1]):  # none changes what another gets
        mine = fast.composed(master, overrides)
        theirs = loader.load_sweep_config(master, overrides)
        assert OmegaConf.to_yaml(mine) == OmegaConf.to_yaml(theirs), overrides
    assert len(fast._composed) == 5
    assert fast.get_sources() == loader.get_sources()


def test_a_mistake_has_hydras_own_message(loader: Any) -> None:
    master = loader.load_configuration("config", [], RunMode.MULTIRUN)
    for overrides in MISTAKES:
        messages = []
        for each in (SweepLoader(loader), loader):
            with pytest.raises(HydraException) as caught:
                each.load_sweep_config(master, overrides)
            messages.append(str(caught.value))
        assert messages[0] == messages[1], overrides


def test_a_validated_job_is_not_composed_again_when_it_is_launched(loader: Any) -> None:
    master = loader.load_configuration("config", [], RunMode.MULTIRUN)
    fast = SweepLoader(loader)
    validated = fast.load_sweep_config(master, ["peft.r=4"])
    assert fast.job(master, ["peft.r=4"]) is validated
    again = fast.job(master, ["peft.r=4"])  # of a later launch
    assert again is not validated
    assert OmegaConf.to_yaml(again) == OmegaConf.to_yaml(validated)


def test_hydras_sweepers_ask_only_whether_a_job_of_a_known_shape_can_be_composed(
    loader: Any,
) -> None:
    master = loader.load_configuration("config", [], RunMode.MULTIRUN)
    fast = SweepLoader(loader)
    sweeper: Any = SimpleNamespace(config=master, config_loader=fast)
    Sweeper.validate_batch_is_legal(sweeper, [["peft.r=4"], ["peft.r=8"]])
    assert list(fast._validated) == [("peft.r=4",)]
    second = fast.load_sweep_config(master, ["peft.r=8"])  # by others, who may use it
    assert second is not None
    theirs = loader.load_sweep_config(master, ["peft.r=8"])
    assert OmegaConf.to_yaml(second) == OmegaConf.to_yaml(theirs)
