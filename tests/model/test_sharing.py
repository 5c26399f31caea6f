"""A copy of the modules, over the tensors of the original."""

from __future__ import annotations

import pytest
import torch

from lora_exp.model.loading import bnb_4bit, bnb_8bit
from lora_exp.model.sharing import sharing_copy
from tests.conftest import tiny


@pytest.mark.parametrize(
    "quantization",
    [None, bnb_4bit("nf4", True, "float32"), bnb_8bit(6.0)],
    ids=["floats", "nf4", "int8"],
)
def test_a_copy_has_its_own_modules_and_the_same_weights(quantization: object) -> None:
    model = tiny(quantization).model.eval()
    copied = sharing_copy(model)
    assert not {*map(id, model.modules())} & {*map(id, copied.modules())}
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    ids = torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, copied(input_ids=ids).logits)
