"""Sizes are those of `lora-exp estimate`, asked once for cells of the same size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from omegaconf import DictConfig

from lora_exp import compose
from lora_exp.after.estimate import model_config, need
from lora_exp.errors import LoraExpError
from lora_exp.search.limits import Size
from lora_exp.search.sizes import Sizes

Values = Mapping[str, str]


@pytest.fixture
def settled() -> list[Values]:
    return []


@pytest.fixture
def sizes(settled: list[Values]) -> Iterator[Sizes]:
    def settle(values: Values) -> DictConfig:
        settled.append(values)
        return compose("tracking=none", *(f"{key}={text}" for key, text in values.items()))

    sizes = Sizes(settle)
    yield sizes
    sizes.close()


def test_a_size_is_the_estimate_and_a_rate_does_not_change_it(
    sizes: Sizes, settled: list[Values]
) -> None:
    cfg = compose("tracking=none", "peft.r=5")
    needed = need(cfg, model_config(cfg))
    cells = [{"peft.r": "5", "train.learning_rate": rate} for rate in ("1e-3", "1e-4")]
    assert {sizes(cell) for cell in cells} == {Size(needed.trainable, needed.total)}
    assert settled == [{"peft.r": "5"}]


def test_a_config_that_its_run_refuses_has_no_size(sizes: Sizes) -> None:
    assert sizes({"peft.r": "0"}) is None
    assert sizes({"peft.target_modules": "[q_prj]"}) is None
    assert sizes({"model": "local", "model.path": "nowhere"}) is None


def test_a_process_that_cannot_answer_ends_the_search_with_the_cell(
    sizes: Sizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(cfg: DictConfig) -> None:
        raise ZeroDivisionError("no layers")

    monkeypatch.setattr("lora_exp.after.estimate.model_config", broken)
    with pytest.raises(LoraExpError, match=r"peft\.r=3 cannot be estimated: ZeroDivisionError: no"):
        sizes({"peft.r": "3"})
    sizes._process.kill()
    sizes._process.join()
    with pytest.raises(LoraExpError, match="the process that estimates sizes has died"):
        sizes({"peft.r": "4"})


def test_a_fault_of_the_search_itself_is_not_hidden() -> None:
    def settle(values: Values) -> DictConfig:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Sizes(settle)({})
