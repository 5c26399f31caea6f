"""The peak memory of a run does not include earlier runs."""

from __future__ import annotations

import sys

import pytest
import torch

from lora_exp.model.memory import peak_bytes, reset_peak


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_can_be_reset() -> None:
    reset_peak()
    low = peak_bytes()
    block = torch.ones(64, 2**20)
    high = peak_bytes()
    del block
    reset_peak()
    assert high - low > 200 * 2**20
    assert peak_bytes() < high
