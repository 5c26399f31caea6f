"""Classes are measured once and cached for all runs under the same conditions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_exp.lockstep.classes import LayerSignature, RowClasses
from lora_exp.lockstep.segment import PassContext
from lora_exp.lockstep.state import PLAIN, ComputeState
from lora_exp.model.loading import bnb_4bit, bnb_8bit
from lora_exp.model.processor import processor
from tests.conftest import tiny

CONTEXT = PassContext(PLAIN, True, False)


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(32, 48, bias=False).requires_grad_(False)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path))


def signature_of(layer: nn.Linear, dtype: torch.dtype = torch.float32) -> LayerSignature:
    return LayerSignature.of(layer, (layer.in_features,), dtype, CONTEXT)


def test_measured_classes_are_read_by_the_next_process(layer: nn.Linear) -> None:
    first = RowClasses("cpu")
    measured = first.class_of(signature_of(layer), layer, 64)
    first.save()
    again = RowClasses("cpu")
    assert again.class_of(signature_of(layer), layer, 64) == measured
    assert not again.unsaved
    assert not again.probes  # nothing was computed


def test_processes_keep_each_others_classes(layer: nn.Linear) -> None:
    first, second = RowClasses("cpu"), RowClasses("cpu")
    for classes, rows in ((first, 8), (second, 16)):
        classes.class_of(signature_of(layer), layer, rows)
        classes.save()
    (saved,) = RowClasses("cpu").classes.values()
    assert set(saved) == {"8", "16"}


def test_layers_of_other_sizes_dtypes_and_modes_have_other_signatures(layer: nn.Linear) -> None:
    wider, classes = nn.Linear(32, 64, bias=False), RowClasses("cpu")
    signatures = {signature_of(layer), signature_of(wider), signature_of(layer, torch.bfloat16)}
    for context in (
        PassContext(ComputeState(False, PLAIN.autocast), True, False),
        PassContext(PLAIN, False, False),
    ):
        signatures.add(LayerSignature.of(layer, (32,), torch.float32, context))
    assert len({str(signature) for signature in signatures}) == 5
    classes.class_of(signature_of(layer), layer, 64)
    assert classes.classes.keys() == {str(signature_of(layer))}


def test_other_threads_and_settings_are_other_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {RowClasses("cpu").path}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        paths.add(RowClasses("cpu").path)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    paths.add(RowClasses("cpu").path)
    assert len(paths) == 3


def test_settings_of_a_quantisation_are_part_of_the_signature() -> None:
    signatures = set()
    settings = [bnb_8bit(0.0), bnb_8bit(6.0), bnb_4bit("nf4", True, "float32")]
    for quantization in [
        *settings,
        bnb_4bit("nf4", False, "float32"),
        bnb_4bit("fp4", True, "float32"),
    ]:
        base = tiny(quantization)
        signatures.add(str(signature_of(base.model.model.layers[0].mlp.up_proj)))
    assert len(signatures) == 5


def test_forgotten_classes_are_deleted_and_none_are_saved_afterwards(layer: nn.Linear) -> None:
    classes = RowClasses("cpu")
    classes.class_of(signature_of(layer), layer, 8)
    classes.save()
    assert classes.path.exists()
    classes.forget()
    classes.class_of(signature_of(layer), layer, 8)
    classes.save()
    assert not classes.path.exists()


@pytest.mark.parametrize("damage", ["", "{", '{"classes": 3}', '{"classes": {"a": 1}}', "[]"])
def test_a_damaged_cache_is_measured_anew(layer: nn.Linear, damage: str) -> None:
    classes = RowClasses("cpu")
    measured = classes.class_of(signature_of(layer), layer, 64)
    classes.path.parent.mkdir(parents=True)
    classes.path.write_text(damage)
    again = RowClasses("cpu")
    assert again.class_of(signature_of(layer), layer, 64) == measured
    again.save()
    assert RowClasses("cpu").classes == again.classes


def test_the_cache_names_the_processor(layer: nn.Linear) -> None:
    classes = RowClasses("cpu")
    classes.class_of(signature_of(layer), layer, 8)
    classes.save()
    conditions = json.loads(classes.path.read_text())["conditions"]
    assert conditions["processor"] == processor()
    assert conditions["threads"] == torch.get_num_threads()
    assert processor()
