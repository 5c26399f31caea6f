"""Classes are measured once for all that computes under the same conditions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_exp.lockstep.classes import Classes, Kind
from lora_exp.lockstep.segment import Mode
from lora_exp.lockstep.state import PLAIN, Precision
from lora_exp.model.loading import bnb_4bit, bnb_8bit
from lora_exp.model.processor import processor
from tests.conftest import tiny

MODE = Mode(PLAIN, True, False)


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(32, 48, bias=False).requires_grad_(False)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path))


def kind_of(layer: nn.Linear, dtype: torch.dtype = torch.float32) -> Kind:
    return Kind.of(layer, (layer.in_features,), dtype, MODE)


def test_what_was_measured_is_read_by_the_next_process(layer: nn.Linear) -> None:
    first = Classes("cpu")
    found = first.of(kind_of(layer), layer, 64)
    first.keep()
    again = Classes("cpu")
    assert again.of(kind_of(layer), layer, 64) == found
    assert not again.measured
    assert not again.probes  # nothing was computed


def test_processes_keep_what_the_others_have_kept(layer: nn.Linear) -> None:
    one, other = Classes("cpu"), Classes("cpu")
    for classes, rows in ((one, 8), (other, 16)):
        classes.of(kind_of(layer), layer, rows)
        classes.keep()
    (kept,) = Classes("cpu").known.values()
    assert set(kept) == {"8", "16"}


def test_layers_of_other_sizes_dtypes_and_modes_are_other_kinds(layer: nn.Linear) -> None:
    wider, classes = nn.Linear(32, 64, bias=False), Classes("cpu")
    kinds = {kind_of(layer), kind_of(wider), kind_of(layer, torch.bfloat16)}
    for mode in (Mode(Precision(False, PLAIN.autocast), True, False), Mode(PLAIN, False, False)):
        kinds.add(Kind.of(layer, (32,), torch.float32, mode))
    assert len({str(kind) for kind in kinds}) == 5
    classes.of(kind_of(layer), layer, 64)
    assert classes.known.keys() == {str(kind_of(layer))}


def test_other_threads_and_settings_are_other_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {Classes("cpu").path}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        paths.add(Classes("cpu").path)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    paths.add(Classes("cpu").path)
    assert len(paths) == 3


def test_settings_of_a_quantisation_are_part_of_a_kind() -> None:
    kinds = set()
    settings = [bnb_8bit(0.0), bnb_8bit(6.0), bnb_4bit("nf4", True, "float32")]
    for one in [*settings, bnb_4bit("nf4", False, "float32"), bnb_4bit("fp4", True, "float32")]:
        base = tiny(one)
        kinds.add(str(kind_of(base.model.model.layers[0].mlp.up_proj)))
    assert len(kinds) == 5


def test_what_was_wrong_is_forgotten_and_not_kept_again(layer: nn.Linear) -> None:
    classes = Classes("cpu")
    classes.of(kind_of(layer), layer, 8)
    classes.keep()
    assert classes.path.exists()
    classes.forget()
    classes.of(kind_of(layer), layer, 8)
    classes.keep()
    assert not classes.path.exists()


@pytest.mark.parametrize("damage", ["", "{", '{"classes": 3}', '{"classes": {"a": 1}}', "[]"])
def test_a_damaged_cache_is_measured_anew(layer: nn.Linear, damage: str) -> None:
    classes = Classes("cpu")
    found = classes.of(kind_of(layer), layer, 64)
    classes.path.parent.mkdir(parents=True)
    classes.path.write_text(damage)
    again = Classes("cpu")
    assert again.of(kind_of(layer), layer, 64) == found
    again.keep()
    assert Classes("cpu").known == again.known


def test_the_cache_names_the_processor(layer: nn.Linear) -> None:
    classes = Classes("cpu")
    classes.of(kind_of(layer), layer, 8)
    classes.keep()
    conditions = json.loads(classes.path.read_text())["conditions"]
    assert conditions["processor"] == processor()
    assert conditions["threads"] == torch.get_num_threads()
    assert processor()
