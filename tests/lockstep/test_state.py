"""Process-wide state."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate.state import GradientState
from torch import nn

from lora_exp.lockstep.state import ProcessState, set_autocast_depth


@pytest.fixture(autouse=True)
def _unchanged() -> object:
    before = ProcessState.now()
    yield
    before.restore()


def test_taking_a_state_sets_default_modes_and_restore_resets_them() -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        state = ProcessState.now()
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        state.restore()
        assert not torch.is_grad_enabled()
        assert torch.get_autocast_dtype("cpu") == torch.float16
        assert torch.is_autocast_enabled("cpu")


def test_accumulation_and_log_handlers_are_a_jobs_own() -> None:
    GradientState()._set_sync_gradients(False)
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    state = ProcessState.now()
    GradientState()._set_sync_gradients(True)
    logging.getLogger().removeHandler(handler)
    state.restore()
    assert GradientState().sync_gradients is False
    assert handler in logging.getLogger().handlers


def test_an_autocast_block_clears_its_casts_while_another_job_waits_in_one() -> None:
    layer, x = nn.Linear(4, 4, bias=False), torch.ones(1, 4)
    waiting = torch.autocast("cpu", torch.bfloat16)
    waiting.__enter__()
    depth = set_autocast_depth(0)  # what the hub does when a job waits inside autocast
    assert depth == 1
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
    with torch.no_grad():
        layer.weight.add_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(layer(x), before)
    set_autocast_depth(depth)
    waiting.__exit__(None, None, None)
