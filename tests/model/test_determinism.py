"""A run's switches end with the run, and a GPU's are set before it computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import enable_full_determinism
from transformers.utils.import_utils import enable_tf32

from lora_exp import compose
from lora_exp.config.settled import fingerprint
from lora_exp.errors import ConfigError
from lora_exp.model.determinism import (
    WORKSPACE,
    Switches,
    explained,
    forked_random_state,
    set_for_gpu,
    switched,
)


def test_what_a_trainer_switches_in_the_whole_process_ends_with_the_last_run() -> None:
    before = Switches.now()
    first, second = switched(True), switched(True)
    first.__enter__()
    second.__enter__()
    enable_full_determinism(0)
    enable_tf32(True)
    first.__exit__(None, None, None)
    assert torch.are_deterministic_algorithms_enabled()  # the other job of the pack goes on
    assert Switches.now() != before
    second.__exit__(None, None, None)
    assert Switches.now() == before
    assert torch.get_float32_matmul_precision() == "highest"  # torch refuses a mixture of settings


def test_on_a_cpu_a_run_switches_nothing() -> None:
    before = Switches.now()
    with switched(True):
        assert torch.cuda.is_available() or Switches.now() == before


@pytest.fixture
def _restored() -> Any:
    before = Switches.now()
    yield
    before.restore()


@pytest.mark.usefixtures("_restored")
def test_a_gpu_gets_deterministic_kernels_and_no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    set_for_gpu(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.allow_tf32
    assert WORKSPACE not in os.environ
    set_for_gpu(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert os.environ[WORKSPACE] == ":4096:8"


@pytest.mark.usefixtures("_restored")
def test_tf32_can_still_be_asked_for() -> None:
    set_for_gpu(deterministic=True)
    enable_tf32(True)  # as trainers do for train.tf32=true
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


@pytest.mark.usefixtures("_restored")
def test_an_operation_without_a_deterministic_kernel_names_the_key() -> None:
    torch.use_deterministic_algorithms(True)
    with (
        pytest.raises(ConfigError, match=r"deterministic: put_ has no kernel.*=false"),
        explained(),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="mat1"), explained():  # other errors stay
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_the_record_says_it_and_only_giving_it_up_is_another_fingerprint(
    quick_run: Callable[..., Any],
) -> None:
    result = quick_run("deterministic=false", "train.max_steps=1", "samples.rows=0")
    assert '"deterministic": false' in (result.directory / "run.json").read_text()
    usual, given_up = (fingerprint(compose(f"deterministic={v}")) for v in ("true", "false"))
    assert usual == fingerprint(compose()) != given_up
    with pytest.raises(ConfigError, match="deterministic: 'often' is neither true nor false"):
        compose("deterministic=often")


def test_random_numbers_drawn_apart_do_not_move_the_stream() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with forked_random_state():
        torch.rand(3)
    assert torch.rand(1) == expected
