"""Segments form one pass where that changes no bit, without padding where nothing sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_exp.lockstep import layout
from lora_exp.lockstep.body import FusedBody
from lora_exp.lockstep.classes import LayerSignature
from lora_exp.lockstep.products import on_grid
from lora_exp.lockstep.segment import PassContext
from lora_exp.lockstep.state import ComputeState
from tests.lockstep.kinds import small_model
from tests.lockstep.test_segment import segments


def body_of(kind: str) -> FusedBody:
    body = FusedBody(small_model(kind).model, "exact")
    with torch.no_grad():
        assert body.enter(PassContext(ComputeState.now(), False, False))
    return body


@pytest.mark.parametrize(("kind", "leaves_out"), [("qwen3", True), ("experts", False)])
def test_layers_that_may_see_padding_keep_it(kind: str, leaves_out: bool) -> None:
    """Experts get padding, too: without it, their products have other numbers of rows."""
    body, (s,) = body_of(kind), segments((2, 30))
    assert body.context is not None
    assert body.leaves_out_padding(body.context) == leaves_out
    s.arguments["attention_mask"] = torch.ones(2, 30)
    s.arguments["attention_mask"][1, 9:] = 0
    with torch.no_grad():
        body.passes([s])
    assert (s.kept is not None) == leaves_out


def test_little_padding_stays() -> None:
    body, (s,) = body_of("qwen3"), segments((2, 20))
    s.arguments["attention_mask"] = torch.ones(2, 20)
    s.arguments["attention_mask"][0, :2] = 0
    with torch.no_grad():
        (p,) = body.passes([s])
    assert s.kept is None
    assert p.sizes == [40]


def test_passes_without_padding_have_lengths_of_the_grid() -> None:
    """So few numbers of rows are measured."""
    body, several = body_of("qwen3"), segments((2, 60), (3, 50))
    for s in several:
        s.arguments["attention_mask"] = torch.ones(s.input_ids_BS.shape)
        s.arguments["attention_mask"][:, 31:] = 0
    with torch.no_grad():
        (p,) = body.passes(several)
    assert [s.tokens for s in several] == [62, 93]
    assert sum(p.sizes) == on_grid(155) == 160


def test_lengths_are_rounded_up_once_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of("qwen3")
    with torch.no_grad():
        (p,) = body.passes(segments((2, 20), (1, 33)))
        assert sum(p.sizes) == 73
        monkeypatch.setattr(layout, "MAX_TOTALS", len(body.layout.totals))
        (p,) = body.passes(segments((2, 20), (1, 34)))
        assert sum(p.sizes) == 80


def test_padding_stays_where_products_in_the_jobs_own_shape_would_compute_it_anyway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A product whose class no smaller number of rows has computes all padding."""
    body, (s,) = body_of("qwen3"), segments((2, 60))
    s.arguments["attention_mask"] = torch.ones(s.input_ids_BS.shape)
    s.arguments["attention_mask"][:, 20:] = 0
    linear = next(layer for layer in body.layers if layer.divisible)
    assert body.context is not None
    signature, class_of = linear.signatures[body.context], body.classes.class_of

    def own_class(measured: LayerSignature, layer: Any, rows: int) -> str | None:
        return str(rows) if measured == signature else class_of(measured, layer, rows)

    with torch.no_grad():
        monkeypatch.setattr(body.classes, "class_of", own_class)
        (p,) = body.passes([s])
        assert s.kept is None
        assert p.sizes == [120]
        monkeypatch.setattr(body.classes, "class_of", class_of)
        body.layout.groupings.clear()
        (p,) = body.passes([s])
        assert s.tokens == 40
