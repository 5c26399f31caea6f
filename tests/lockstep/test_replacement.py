"""A replacement has the settings of the module whose place it takes."""

from __future__ import annotations

import pytest
from torch import nn

from lora_exp.lockstep.replacement import Replacement


def test_other_code_reads_the_modules_own_settings() -> None:
    linear = nn.Linear(3, 5)
    replaced = Replacement(linear, body="body")
    assert (replaced.in_features, replaced.out_features, replaced.body) == (3, 5, "body")
    assert replaced.weight is linear.weight
    assert dict(replaced.named_children()) == {"base": linear}  # the body is no submodule
    with pytest.raises(AttributeError, match="no_such"):
        replaced.no_such  # noqa: B018
