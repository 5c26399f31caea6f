"""Training mixes no tensors of two devices: found without a GPU, see `elsewhere`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from lora_exp import compose, run
from lora_exp.training.place import Alone
from tests.elsewhere import ELSEWHERE, Elsewhere, elsewhere_available

SHORT = ["tracking=none", "train.logging_steps=1", "train.optim=adamw_torch", "samples.rows=1"]
SHORT += ["samples.max_new_tokens=2", "train.save_strategy=no", "train.eval_strategy=no"]
SHORT += ["train.per_device_train_batch_size=2", "train.per_device_eval_batch_size=2"]
PAIRS = ["data.rows=8", "data.eval_rows=2", "train.max_steps=1"]
ROLLOUTS = [*PAIRS, "algorithm.args.max_completion_length=2"]


class Moved(Alone):
    """A place whose runs measure and train on the other device."""

    def join(self, trainer: Any) -> None:
        """Move the model, and what the trainer will put on its device."""
        super().join(trainer)
        trainer.args.__dict__["_setup_devices"] = ELSEWHERE
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = ELSEWHERE
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is not None:
                model.to(ELSEWHERE)


def _of_cpu(function: Any, device_type: str = "cpu") -> Any:
    return function("cpu" if device_type == ELSEWHERE.type else device_type)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moved]:
    for name in ("is_autocast_enabled", "get_autocast_dtype"):  # unknown of the device `meta`
        monkeypatch.setattr(torch, name, partial(_of_cpu, getattr(torch, name)))
    devices = [dict(state._shared_state) for state in (PartialState, AcceleratorState)]
    with elsewhere_available():
        yield Moved()
    for state, values in zip((PartialState, AcceleratorState), devices, strict=True):
        state._shared_state.clear()
        state._shared_state.update(values)


def test_a_mixture_fails() -> None:
    with elsewhere_available():
        there = torch.ones(2, 2, device=ELSEWHERE, requires_grad=True)
        with pytest.raises(RuntimeError, match="mm mixes tensors of two devices"):
            there @ torch.ones(2, 2)
        (there @ torch.ones(2, 2).to(there.device) * torch.tensor(2.0)).sum().backward()
    assert isinstance(there.grad, Elsewhere)
    assert there.grad.tolist() == [[4.0, 4.0], [4.0, 4.0]]


@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm=sft", "data.max_rows=8", "data.max_eval_rows=2", "train.max_steps=3"],
        ["experiment=demo_dpo", *PAIRS],
        ["experiment=demo_reward", *PAIRS],
        ["experiment=demo_grpo", *ROLLOUTS, "algorithm.args.num_generations=2"],
        ["experiment=demo_ppo", *ROLLOUTS],
    ],
    ids=lambda settings: settings[0],
)
def test_an_algorithm_trains_on_another_device(
    elsewhere: Moved, tmp_path: Path, settings: list[str]
) -> None:
    result = run(compose(*settings, *SHORT), tmp_path / "run", place=elsewhere)
    assert "step" in (result.directory / "metrics.jsonl").read_text()
    assert result.saved
