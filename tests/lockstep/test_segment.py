"""A job's rows in a pass: their shape, their alignment in memory, their products."""

from __future__ import annotations

import torch

from lora_exp.lockstep.products import Group
from lora_exp.lockstep.segment import ALIGNMENT, LayerGroups, Pass, Segment, split
from lora_exp.lockstep.state import RandomState


def segments(*shapes: tuple[int, int]) -> list[Segment]:
    ids = [torch.zeros(b, length, dtype=torch.long) for b, length in shapes]
    random = RandomState.now()
    return [Segment(job, {"input_ids": x}, random) for job, x in enumerate(ids)]


def test_a_jobs_rows_are_aligned_like_a_tensor_of_their_own() -> None:
    p = Pass(segments((1, 3), (2, 5), (1, 2)), 4, None)  # rows of 65 numbers are not aligned
    whole = torch.randn(1, sum(p.sizes), 65, requires_grad=True)
    parts = split(whole, p.sizes)
    assert any(part.data_ptr() % ALIGNMENT for part in parts)
    for segment, part in zip(p.segments, parts, strict=False):
        rows = segment.rows(part)
        assert rows.data_ptr() % ALIGNMENT == 0
        assert rows.shape == (*segment.input_ids_BS.shape, 65)
        assert torch.equal(rows.reshape(1, segment.tokens, 65), part)
    p.segments[1].rows(parts[1]).sum().backward()
    assert whole.grad is not None
    assert torch.equal(whole.grad[0, :, 0], torch.tensor([0.0] * 3 + [1.0] * 10 + [0.0] * 6))


def test_values_of_one_row_are_repeated_for_all() -> None:
    (s,) = segments((3, 2))
    assert s.flat(torch.tensor([[4, 5]])).tolist() == [4, 5] * 3
    assert s.flat(torch.arange(6).view(3, 2)).tolist() == list(range(6))


def test_a_pass_lists_the_products_of_a_segment() -> None:
    first = LayerGroups(torch.float32, (Group((0, 1), 16), Group((2,), 4)))
    second = LayerGroups(torch.float32, (Group((0,), 6), Group((1, 2), 16)))
    p = Pass(segments((1, 6), (2, 5), (1, 4)), 0, (first, second, first, None))
    assert p.products_of(0) == {(6, 16, False), (6, 6, False)}
    assert p.products_of(2) == {(4, 4, False), (4, 16, False)}
    assert Pass(p.segments, 0, None).products_of(1) == {(10, 10, False)}
    assert p.is_alone is Pass(p.segments[:1], 1, None).is_alone is False
    assert Pass(p.segments[:1], 0, None).is_alone
