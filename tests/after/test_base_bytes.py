"""Bytes of a base: those of the loaded weights and their scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp import compose
from lora_exp.after.base_bytes import base_bytes, dequantised_bytes
from lora_exp.after.estimate import estimate, model_config, skeleton
from lora_exp.model.loading import base_of
from tests.model.test_mixture import GRANITE


def loaded_bytes(model: Any) -> int:
    """Count the bytes that a loaded model's weights take, their scales included."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            inner = state.state2
            tensors += [state.absmax, *([inner.absmax] if inner is not None else [])]
        if (scales := getattr(parameter, "SCB", None)) is not None:
            tensors.append(scales)
    # where they lie once the layer has computed
    states = (getattr(module, "state", None) for module in model.modules())
    tensors += [state.SCB for state in states if getattr(state, "SCB", None) is not None]
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())


@pytest.mark.parametrize(
    "quant",
    [
        ["none"], ["nf4"], ["int8", "quant.skip_modules=[layers.0,o_proj]"],
        ["fp4", "quant.double_quant=false"],
    ],
    ids=lambda q: q[0],
)  # fmt: skip
def test_a_quantised_base_takes_the_estimated_bytes(quant: list[str]) -> None:
    cfg = compose("tracking=none", f"quant={quant[0]}", *quant[1:])
    model = skeleton(cfg, model_config(cfg))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    measured = loaded_bytes(base_of(cfg).model)
    assert base_bytes(model, cfg.quant) == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_so_do_experts_and_those_of_one_layer_in_floats(
    quant: str, folder_of: Callable[[Any], Path]
) -> None:
    place = ["model=local", f"model.path={folder_of(GRANITE)}", "tracking=none"]
    cfg = compose(*place, f"quant={quant}")
    model = skeleton(cfg, model_config(cfg))
    assert base_bytes(model, cfg.quant) == pytest.approx(loaded_bytes(base_of(cfg).model), rel=0.01)
    assert dequantised_bytes(model, cfg.quant) == (4 * 3 * 32 * 32 * 4 if quant == "nf4" else 0)
    needed = {row["quant"]: row["activations"] for row in estimate(cfg)["rows"]}
    assert needed["nf4"] - needed["int8"] == 4 * 3 * 32 * 32 * 4


def test_what_a_run_refuses_to_adapt_is_no_estimate(folder_of: Callable[[Any], Path]) -> None:
    place = ["model=local", f"model.path={folder_of(GRANITE)}", "tracking=none"]
    cfg = compose(*place, "targets=all_linear+experts", "quant=nf4")
    rows = {row["quant"]: row for row in estimate(cfg)["rows"] if row["peft"] == "lora"}
    assert "peft adapts experts in floats only" in rows["nf4"]["refused"]
    assert "refused" not in rows["none"]
    left = estimate(
        compose(*place, "targets=all_linear+experts", "quant=nf4", "quant.experts=false")
    )["rows"]
    assert "refused" not in next(row for row in left if row["chosen"])
