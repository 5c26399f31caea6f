"""The peak memory of a run does not include earlier runs."""

from __future__ import annotations

import sys

import pytest
import torch

from lora_exp.model.memory import peak_bytes, reset_peak
from tests.warm import python

KEPT = """
import torch
from lora_exp.model.memory import keep_freed, peak_bytes, reset_peak
keep_freed()
blocks = [torch.ones(2**23) for _ in range(8)]
high = peak_bytes()
del blocks
reset_peak()
print(high - peak_bytes())
"""


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


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_what_an_earlier_pack_has_freed_is_not_in_the_peak() -> None:
    done = python("-c", KEPT)
    assert int(done.stdout) > 200 * 2**20, done.stderr
