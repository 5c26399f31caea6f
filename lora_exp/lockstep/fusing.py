"""The layers of a body, with modules that run the rows of several jobs in place of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_exp.lockstep.attention import FusedAttention
from lora_exp.lockstep.eligibility import kind_of
from lora_exp.lockstep.layers import layers_of
from lora_exp.lockstep.linear import FusedLinear
from lora_exp.lockstep.rowwise import Rowwise
from lora_exp.lockstep.segmentwise import SegmentWise


class FusedLayers:
    """Replaces the modules in the layers of a body, by their kind."""

    def __init__(self, body: Any, fused: Any) -> None:
        """Change the layers of a body.

        Args:
            body: a copy, of which only the layers are run.
            fused: the `FusedBody` that runs them.
        """
        self.body, self.fused = body, fused
        self.blocks: dict[str, Any] = layers_of(body)
        self.rowwise: list[Rowwise] = []
        self.linears: dict[str, FusedLinear] = {}
        self.segmentwise: list[str] = []  # modules that run for each job by itself
        self.modules = list(body.modules())  # the body's own, which stay
        for name, block in self.blocks.items():
            self._replace_children(name, block)
        for module in body.modules():
            object.__setattr__(module, "fused_body", fused)  # `attention` reads its segments

    def _replace_children(self, path: str, parent: nn.Module, only_linear: bool = False) -> None:
        for leaf, module in list(parent.named_children()):
            name, kind = f"{path}.{leaf}", kind_of(module, self.fused.implementation)
            if kind == "linear":
                self.linears[name] = FusedLinear(module, self.fused, len(self.rowwise))
                self._replace(parent, leaf, self.linears[name])
            elif only_linear:
                self._replace_children(name, module, only_linear)
            elif kind in ("norm", "activation"):
                divisible = kind == "activation"
                row = Rowwise(module, self.fused, len(self.rowwise), divisible)
                self._replace(parent, leaf, row)
            else:
                self._replace_children(name, module, only_linear=kind == "other")
                if kind == "attention":
                    setattr(parent, leaf, FusedAttention(module, self.fused))
                elif kind == "other":
                    setattr(parent, leaf, SegmentWise(module, self.fused, name))
                    self.segmentwise.append(name)

    def _replace(self, parent: nn.Module, leaf: str, row: Rowwise) -> None:
        self.rowwise.append(row)
        setattr(parent, leaf, row)
