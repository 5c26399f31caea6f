"""A layer refuses rows of a pass that nobody has measured."""

from __future__ import annotations

import pytest
import torch

from lora_exp.lockstep.rowwise import Unmeasured
from tests.lockstep.test_layout import body_of
from tests.lockstep.test_segment import segments


@pytest.mark.parametrize("padding", [False, True])
def test_unmeasured_rows_are_refused_but_those_of_a_run_alone(padding: bool) -> None:
    """A pass of one job without its padding has other rows than the run alone, too."""
    body, (s,) = body_of("llama"), segments((2, 30))
    s.arguments["attention_mask"] = torch.ones(2, 30)
    s.arguments["attention_mask"][1, 9 if padding else 30 :] = 0
    norm = next(layer for layer in body.layers if not layer.divisible)
    of_an_unknown_shape = torch.randn(3, 7, 64)
    of_another_dtype = torch.randn(1, 39 if padding else 60, 64, dtype=torch.float64)
    with torch.no_grad():
        (p,) = body.passes([s])
        assert (s.kept is not None) == padding
        for x in (of_an_unknown_shape, of_another_dtype):
            if padding:
                x = torch.cat([x, x.new_zeros(1, p.filling, 64)], 1) if len(x) == 1 else x
                with pytest.raises(Unmeasured, match="is given"):
                    norm.products(x, p)
            else:
                assert torch.equal(norm.products(x, p), norm.base(x))
