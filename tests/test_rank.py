"""What one of a run's processes reports; whole ones run in parallel/test_launch.py."""

from __future__ import annotations

import torch

from lora_exp.errors import ConfigError, DataError, RewardError
from lora_exp.parallel.launch import LOST
from lora_exp.rank import _report


def test_errors_are_reported_by_their_kind() -> None:
    fault = ("data.path", "no file matches x")
    assert _report(ConfigError([fault])) == {"kind": "ConfigError", "faults": [fault]}
    assert _report(DataError("row 3")) == {"kind": "DataError", "text": "row 3"}
    for error in (
        torch.distributed.DistBackendError("NCCL error"),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    ):
        assert _report(error)["kind"] == LOST
    report = _report(FileNotFoundError("/data/igloo/gloo/x"))
    assert report["text"] == "FileNotFoundError: /data/igloo/gloo/x"
    assert _report(SystemExit(0))["text"] == "SystemExit: 0"


def test_a_traceback_goes_with_what_is_not_ours_and_with_what_a_reward_has_raised() -> None:
    def reward() -> None:
        raise KeyError("answer")

    try:
        reward()
    except KeyError as error:
        report = _report(error)
        wrapped = RewardError("reward fails")
        wrapped.__cause__ = error
    assert "in reward" in report["traceback"]
    report = _report(wrapped)
    assert (report["kind"], report["text"]) == ("RewardError", "reward fails")
    assert "in reward" in report["traceback"]
