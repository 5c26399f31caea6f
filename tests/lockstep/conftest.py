"""What tests of composing share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lora_exp.config.door import CONF


@pytest.fixture(scope="module")
def loader() -> Iterator[Any]:
    """Hydra's own config loader, of the shipped configs."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        yield hydra.config_loader
