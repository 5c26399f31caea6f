"""A linear layer of the base and the jobs' adapters on it; shapes as in `segment`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_exp.lockstep.segment import Segment
from lora_exp.lockstep.state import RandomState


def split(x_1NC: Tensor, sizes: list[int], dim: int = 1) -> list[Tensor]:
    """Cut a pass's tokens into its segments' (one node in autograd's graph, not one for each)."""
    return list(torch.split(x_1NC, sizes, dim))


class Adapter:
    """One job's LoRA layer, whose own forward gets the base's product instead of computing it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.given: Tensor | None = None
        base = layer.get_base_layer()
        compute = base.forward
        base.forward = lambda x: compute(x) if self.given is None else self.given

    def __call__(self, x_BSC: Tensor, product_BSC: Tensor, segment: Segment) -> Tensor:
        """Add the adapter's part to the base's product."""
        self.given = product_BSC
        try:
            with drawing(segment, self.layer.lora_dropout.values()):
                out: Tensor = self.layer(x_BSC)
        finally:
            self.given = None
        return out

    def active(self) -> Iterator[tuple[nn.Module, Tensor, Tensor, float]]:
        """Yield dropout, A, B and scaling of each adapter that is switched on."""
        layer = self.layer
        for name in () if layer.disable_adapters else layer.active_adapters:
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                yield layer.lora_dropout[name], a, b, layer.scaling[name]


@contextmanager
def drawing(segment: Segment, dropouts: Iterable[nn.Module]) -> Iterator[None]:
    """Draw from the job's random stream, where anything is drawn at all."""
    if not any(isinstance(d, nn.Dropout) and d.training for d in dropouts):
        yield
        return
    segment.random.restore()
    try:
        yield
    finally:
        segment.random = RandomState.now()


class FusedLinear(nn.Module):
    """A linear layer of the base with, for each job that adapts it, the job's own adapter.

    `exact`: the base's product of all tokens at once, where that is known to be, bit for bit, the
    product of each segment alone (`FusedBody.rows`); then peft's own forward for each job. `bmm`:
    adapters are stacked too, ranks and tokens padded with zeros; about 1e-6 off.
    """

    def __init__(self, base: nn.Module, body: Any) -> None:
        """Stand in for a layer of a `FusedBody`."""
        super().__init__()
        self.base = base
        self.layers: dict[int, Adapter] = {}  # the jobs' modules, not ours
        self.body = body  # no nn.Module, so not ours either
        weight: Any = base.weight
        self.shape = (type(base), base.in_features, base.out_features, weight.dtype)

    def forward(self, x_1NC: Tensor) -> Tensor:
        """Return the adapted products, [1, N, C]."""
        segments: list[Segment] = self.body.segments
        sizes = [s.tokens for s in segments]
        rows: float = self.body.rows.get(self.shape, math.inf)
        if self.body.kind == "bmm":
            return self._stacked(x_1NC, segments)
        products = self._products(x_1NC, segments, rows)
        if not self.layers:
            return products[0] if len(products) == 1 else torch.cat(products, 1)
        # split again, so that autograd adds up the gradients of x in the order of a run alone
        out = []
        for s, x, y in zip(segments, split(x_1NC, sizes), products, strict=True):
            layer = self.layers.get(s.job)
            done = y if layer is None else layer(s.rows(x), s.rows(y), s)
            out.append(done.reshape(1, s.tokens, -1))
        return torch.cat(out, 1)

    def _products(self, x_1NC: Tensor, segments: list[Segment], rows: float) -> list[Tensor]:
        """Return the base's product of each segment: at once, where that is exact."""
        sizes = [s.tokens for s in segments]
        some = sum(size >= rows for size in sizes) > 1
        whole = split(self.base(x_1NC), sizes) if some else []
        if some and min(sizes) >= rows:
            return whole
        own = zip(segments, split(x_1NC, sizes), strict=True)
        return [
            whole[i] if some and s.tokens >= rows else self.base(s.rows(x)).view(1, s.tokens, -1)
            for i, (s, x) in enumerate(own)
        ]

    def _stacked(self, x_1NC: Tensor, segments: list[Segment]) -> Tensor:
        """Add all adapters in two batched products; J jobs, T tokens of the longest, R top rank."""
        y_1NC: Tensor = self.base(x_1NC)
        parts = zip(segments, split(x_1NC, [s.tokens for s in segments]), strict=True)
        found = [
            (s, x, active)
            for s, x in parts
            if (layer := self.layers.get(s.job))
            for active in layer.active()
        ]
        if not found:
            return y_1NC
        xs, downs, ups = [], [], []
        for s, x, (dropout, down, up, scaling) in found:
            with drawing(s, [dropout]):
                xs.append(dropout(x[0].to(down.dtype)))
            downs.append(down)
            ups.append(up.T * scaling)
        x_JTC, a_JRC, b_JRC = (pad_sequence(t, batch_first=True) for t in (xs, downs, ups))
        delta_JTC = torch.bmm(torch.bmm(x_JTC, a_JRC.mT), b_JRC)
        deltas: dict[int, Tensor] = {}
        for (s, _, _), delta in zip(found, delta_JTC, strict=True):
            deltas[s.job] = deltas.get(s.job, 0) + delta[: s.tokens]
        none = y_1NC.new_zeros
        rows = [deltas.get(s.job, none((s.tokens, y_1NC.shape[-1]))) for s in segments]
        return y_1NC + torch.cat(rows)[None].to(y_1NC.dtype)
