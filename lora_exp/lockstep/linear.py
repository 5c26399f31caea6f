"""A linear layer of the base and the jobs' adapters on it; shapes as in `segment`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_exp.lockstep.rowwise import Rowwise
from lora_exp.lockstep.segment import Pass, Segment, aligned, split
from lora_exp.lockstep.state import RandomState


class Adapter:
    """One job's LoRA layer; its forward gets the base's product instead of computing it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.base_product: Tensor | None = None
        base = layer.get_base_layer()
        base_forward = base.forward
        base.forward = lambda x: base_forward(x) if self.base_product is None else self.base_product

    def __call__(self, x_BSC: Tensor, product_BSC: Tensor, segment: Segment) -> Tensor:
        """Add the adapter's part to the base's product."""
        self.base_product = product_BSC
        try:
            with job_random_stream(segment, self.layer.lora_dropout.values()):
                out: Tensor = self.layer(x_BSC)
        finally:
            self.base_product = None
        return out

    @staticmethod
    def active_of(layer: Any) -> Iterator[tuple[nn.Module, Tensor, Tensor, float]]:
        """Yield dropout, A, B and scaling of each adapter of a layer that is switched on."""
        for name in () if layer.disable_adapters else layer.active_adapters:
            if name in layer.lora_A:
                a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                yield layer.lora_dropout[name], a, b, layer.scaling[name]


@contextmanager
def job_random_stream(segment: Segment, dropouts: Iterable[nn.Module]) -> Iterator[None]:
    """Use the job's random stream, if one of the dropouts is active."""
    if not any(isinstance(d, nn.Dropout) and d.training for d in dropouts):
        yield
        return
    segment.random.restore()
    try:
        yield
    finally:
        segment.random = RandomState.now()


class FusedLinear(Rowwise):
    """A linear layer of the base with, for each job that adapts it, the job's own adapter.

    `exact`: the base's products are shared as in `Rowwise`, then peft's own forward runs for each
    job. `bmm`: adapters are stacked too, ranks and tokens padded with zeros; about 1e-6 off.
    """

    def __init__(self, base: nn.Module, body: Any, index: int) -> None:
        """Replace a linear layer; see `Rowwise`."""
        super().__init__(base, body, index)
        self.adapters: dict[int, Adapter] = {}  # a plain dict: the modules belong to the jobs

    def forward(self, x_1NC: Tensor) -> Tensor:
        """Return the adapted products, [1, N, C]; of [N, C] also as [N, C]."""
        flat = self.is_flat(x_1NC)
        with self.body.known():
            x_1NC = x_1NC[None] if flat else x_1NC
            p: Pass = self.body.current
            stacked = self.body.mode == "bmm"
            output = self._stacked(x_1NC, p) if stacked else self._adapted(x_1NC, p, flat)
            return output[0] if flat else output

    def together(self, parts: list[Tensor], p: Pass) -> list[Tensor | None]:
        """Return the base's products, without adapters, of the rows of jobs that may share them.

        Args:
            parts: each segment's rows, in its own shape.
            p: the pass.

        Returns:
            Each segment's products; None where the job has to compute them by itself.
        """
        products: list[Tensor | None] = [None] * len(parts)
        for g in self.groups((parts[0].shape[-1],), parts[0].dtype, p):
            if g.own_shape:
                continue
            inputs = [parts[i].reshape(-1, parts[i].shape[-1]) for i in g.members]
            if filling := g.rows - sum(map(len, inputs)):
                inputs.append(inputs[0].new_zeros(filling, inputs[0].shape[-1]))
            y_1NC = self.base(torch.cat(inputs)[None])
            # not views for autograd: a job's own code may write into its part
            shared = torch.unsafe_split_with_sizes(y_1NC, [len(x) for x in inputs], 1)
            for i, part in zip(g.members, shared, strict=False):
                products[i] = aligned(part).view(*parts[i].shape[:-1], part.shape[-1])
        return products

    def _adapted(self, x_1NC: Tensor, p: Pass, flat: bool) -> Tensor:
        products = self.products(x_1NC, p, flat)
        if not self.adapters:
            return products if isinstance(products, Tensor) else torch.cat(products, 1)
        parts = split(products, p.sizes) if isinstance(products, Tensor) else products
        # split again, so that autograd adds the gradients of x in the order of a run alone
        out = parts[:]  # the filling stays as it is
        for i, (s, x) in enumerate(zip(p.segments, split(x_1NC, p.sizes), strict=False)):
            layer = self.adapters.get(s.job)
            if layer is not None:
                own_x, product = (s.rows(t[0] if flat else t) for t in (x, parts[i]))
                adapted = layer(own_x, product, s)
                own = adapted if adapted.dim() == 3 else adapted.view(*s.input_ids_BS.shape, -1)
                out[i] = s.flat(own)[None]
        return torch.cat(out, 1)

    def _stacked(self, x_1NC: Tensor, p: Pass) -> Tensor:
        """Add all adapters in two batched products; J jobs, T most tokens, R largest rank."""
        y_1NC: Tensor = self.base(x_1NC)
        segments = p.segments
        parts = zip(segments, split(x_1NC, p.sizes), strict=True)
        stacked = [
            (s, x, active)
            for s, x in parts
            if (layer := self.adapters.get(s.job))
            for active in Adapter.active_of(layer.layer)
        ]
        if not stacked:
            return y_1NC
        xs, downs, ups = [], [], []
        for s, x, (dropout, down, up, scaling) in stacked:
            with job_random_stream(s, [dropout]):
                xs.append(dropout(x[0].to(down.dtype)))
            downs.append(down)
            ups.append(up.T * scaling)
        x_JTC, a_JRC, b_JRC = (pad_sequence(t, batch_first=True) for t in (xs, downs, ups))
        delta_JTC = torch.bmm(torch.bmm(x_JTC, a_JRC.mT), b_JRC)
        deltas: dict[int, Tensor] = {}
        for (s, _, _), delta in zip(stacked, delta_JTC, strict=True):
            deltas[s.job] = deltas.get(s.job, 0) + delta[: s.tokens]
        zeros = y_1NC.new_zeros
        rows = [deltas.get(s.job, zeros((s.tokens, y_1NC.shape[-1]))) for s in segments]
        return y_1NC + torch.cat(rows)[None].to(y_1NC.dtype)
