"""A base computes in one precision in training, answering and rewarding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_exp import compose
from lora_exp.after.loading import Loaded
from lora_exp.model import precision
from lora_exp.model.loading import Base, base_of, bnb_4bit
from lora_exp.model.precision import (
    autocast_dtype,
    computes_in_float64,
    dtype_of,
    has_bfloat16,
    is_quantised,
    lacks_bfloat16,
    slow_products,
    stored_dtype,
)
from lora_exp.rewards import AdapterReward
from lora_exp.training.trainer import _precision
from tests.conftest import tiny

PRECISIONS = [
    (["model.dtype=float32"], None),
    (["model.dtype=bfloat16"], torch.bfloat16),
    (["model.dtype=float16"], None),
    (["quant=nf4"], torch.float16 if lacks_bfloat16() else torch.bfloat16),
    (["quant=nf4", "quant.compute_dtype=float16"], torch.float16),
    (["quant=nf4", "quant.compute_dtype=float32", "model.dtype=float32"], None),
    (["quant=int8"], torch.float16 if lacks_bfloat16() else torch.bfloat16),
]
IDS = [",".join(overrides) for overrides, _ in PRECISIONS]


def test_auto_is_float32_without_a_gpu() -> None:
    assert dtype_of("auto") is (torch.bfloat16 if has_bfloat16() else torch.float32)
    assert dtype_of("float16") is torch.float16
    expected = torch.float16 if lacks_bfloat16() else torch.bfloat16
    assert bnb_4bit("nf4", True, "auto").bnb_4bit_compute_dtype is expected


def autocast_dtype_in(module: Any, action: Callable[[], Any]) -> torch.dtype | None:
    """Return autocast's dtype while a module was called; None: autocast was off."""
    dtypes: list[torch.dtype | None] = []

    def record(*_: Any) -> None:
        device_type = module.device.type
        on = torch.is_autocast_enabled(device_type)
        dtypes.append(torch.get_autocast_dtype(device_type) if on else None)

    handle = module.register_forward_pre_hook(record)
    action()
    handle.remove()
    return dtypes[0]


@pytest.mark.parametrize(("overrides", "dtype"), PRECISIONS, ids=IDS)
def test_training_and_answering_compute_in_the_same_precision(
    overrides: list[str], dtype: torch.dtype | None
) -> None:
    cfg = compose("tracking=none", *overrides)
    base = base_of(cfg)
    assert is_quantised(base.model) == (cfg.quant is not None)
    flags = _precision(cfg, base)
    assert flags["bf16"] == (dtype == torch.bfloat16)
    assert flags.get("fp16", False) == (dtype == torch.float16)
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert autocast_dtype(model) == dtype
    loaded = Loaded("x", model.eval(), base.tokenizer)

    def answer() -> None:
        with loaded.answering():
            model(input_ids=torch.tensor([[1, 2, 3]], device=model.device))

    assert autocast_dtype_in(base.model, answer) == dtype


def test_full_fine_tuning_uses_bfloat16_if_the_gpu_supports_it() -> None:
    cfg = compose("tracking=none", "peft=none")
    base = base_of(cfg)
    assert _precision(cfg, base) == {"bf16": has_bfloat16()}
    assert autocast_dtype(base.model) is None


@pytest.mark.parametrize(("overrides", "dtype"), PRECISIONS, ids=IDS)
def test_a_reward_adapter_scores_in_the_same_precision(
    trained: Callable[..., Path], overrides: list[str], dtype: torch.dtype | None
) -> None:
    saved = trained("algorithm=reward", "data=demo_pairs", "samples.rows=0") / "adapter"
    cfg = compose("tracking=none", *overrides)
    base: Base = base_of(cfg)
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"]))
    reward = AdapterReward(str(saved), cfg, model, base.tokenizer, "reward_adapter")

    def score() -> None:
        assert len(reward(["Who are you?"], [" I am Lora."])) == 1

    assert autocast_dtype_in(base.model.model, score) == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_stored_dtype_of_a_base_is_read_from_its_files(tmp_path: Path, dtype: str) -> None:
    base = tiny(dtype=dtype)
    base.model.save_pretrained(tmp_path / "base")
    model = compose("tracking=none", "model=local", f"model.path={tmp_path / 'base'}").model
    assert stored_dtype(model) == dtype
    assert stored_dtype(compose("tracking=none", "model.random_weights=true").model) is None


def test_whether_a_class_computes_in_float64_is_tried(fresh_base: Any) -> None:
    model = fresh_base.model
    assert computes_in_float64(model)
    assert model.dtype == torch.float32
    rounds = model.model.norm.register_forward_hook(lambda _, __, hidden: hidden.float())
    assert not computes_in_float64(model)
    assert model.dtype == torch.float32
    rounds.remove()
    assert computes_in_float64(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of bases on a processor")
@pytest.mark.parametrize(
    ("overrides", "cure"),
    [
        (["quant=nf4"], "quant.compute_dtype=float32"),
        (["quant=int8"], "quant=none"),
        (["model.dtype=bfloat16"], "model.dtype=float32"),
        (["quant=nf4", "quant.compute_dtype=float32"], None),
        ([], None),
    ],
)
def test_a_processor_without_products_in_bfloat16_is_named_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], cure: str | None
) -> None:
    model = base_of(compose("tracking=none", *overrides)).model
    for flags in ("fma avx2 avx512f avx512bw", ""):
        monkeypatch.setattr(precision, "processor", lambda flags=flags: {"flags": flags})
        assert slow_products(model) is None
    monkeypatch.setattr(precision, "processor", lambda: {"flags": "fma avx2"})
    warning = slow_products(model)
    assert (
        (warning is None) if cure is None else warning.endswith(f"slower than in float32; {cure}")
    )
