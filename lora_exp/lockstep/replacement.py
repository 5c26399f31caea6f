"""A module in place of one of the base's, for the rows of several jobs."""

from __future__ import annotations

from typing import Any

from torch import nn


class Replacement(nn.Module):
    """Replaces a module of a `FusedBody`; other code still reads the module's settings from it."""

    def __init__(self, base: nn.Module, body: Any) -> None:
        """Replace a module.

        Args:
            base: the module.
            body: the `FusedBody`; it is no nn.Module, so it does not become a submodule.
        """
        super().__init__()
        self.base, self.body = base, body

    def __getattr__(self, name: str) -> Any:
        """Return the module's own attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)
