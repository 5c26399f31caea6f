"""What crosses from the worker to the launcher."""

from __future__ import annotations

import pickle
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from lora_exp.errors import ConfigError, LoraExpError
from lora_exp.lockstep.job import failed
from lora_exp.lockstep.worker import portable


def returned(value: Any) -> JobReturn:
    result = JobReturn()
    result.return_value, result.status = value, JobStatus.FAILED
    return result


class Unsendable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("no")


def test_a_config_error_arrives_with_its_faults() -> None:
    sent = pickle.loads(pickle.dumps(portable(returned(ConfigError([("peft.r", "no rank")])))))
    assert sent._return_value.faults == [("peft.r", "no rank")]


def test_what_cannot_be_sent_arrives_as_its_text() -> None:
    value = portable(returned(Unsendable("gone")))._return_value
    assert isinstance(value, LoraExpError)
    assert str(value) == "Unsendable: gone"


def test_a_job_that_was_lost_looks_like_one_that_failed() -> None:
    hydra = {"overrides": {"task": ["a=1"]}, "job": {"name": "run"}}
    config = OmegaConf.create({"hydra": hydra, "a": 1})
    result = failed(config, LoraExpError("killed"))
    assert (result.cfg, result.overrides) == ({"a": 1}, ["a=1"])
    assert result.hydra_cfg == {"hydra": hydra}
    assert config == {"hydra": hydra, "a": 1}  # copies, without a change of their source
    assert result.hydra_cfg.hydra._get_full_key("job") == "hydra.job"
    assert result.status == JobStatus.FAILED
