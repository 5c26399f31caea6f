"""Positions are computed for each job in its own shape, as its run alone computes them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lora_exp.lockstep.attention import Positions
from lora_exp.lockstep.segment import Pass
from tests.lockstep.test_segment import segments


class Threaded(nn.Module):
    """A rotary embedding whose last bits depend on the number of elements, as with 3 threads."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(x, position_ids)
        return cos + 2.0**-20 * position_ids.shape[1], sin + 2.0**-20 * position_ids.shape[1]


def test_each_job_has_the_positions_of_its_run_alone() -> None:
    p = Pass(segments((2, 5), (1, 9)), 3, None)
    p.segments[0].positions = torch.arange(5)[None]
    p.segments[1].positions = torch.arange(4, 13)[None]
    base, x = Threaded(), torch.zeros(1, sum(p.sizes), 64)
    together = Positions(base, SimpleNamespace(current=p))(x, torch.zeros(1, 22))
    for i in range(2):  # cosines, sines
        first, second = (base(x[:, :1], s.positions)[i][0] for s in p.segments)
        filling = torch.zeros(3, first.shape[-1])
        assert torch.equal(together[i], torch.cat([first, first, second, filling])[None])
