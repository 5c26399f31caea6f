"""A proof: passes over random rows of several jobs equal the body's own forward, bit for bit.

Also, outside of modules whose numbers of rows are measured or that run for each job by itself, a
fused layer may only move numbers, and add or multiply them one by one: anything else (a sigmoid, a
sum over channels) could depend on the number of rows in ways that no random row shows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_exp.lockstep.outputs import tensors_of, without_padding
from lora_exp.lockstep.rowwise import Unmeasured
from lora_exp.lockstep.segment import CACHES, Pass, Segment
from lora_exp.lockstep.state import PLAIN, ComputeState, RandomState

# rows, tokens and padding of the jobs in a test pass: on the left of the first row, where a mask is
# needed, and on the right of the last. One token a row, as in generation, is in it, and in all so
# much padding that it is left out where it may be
SHAPES = [(2, 9, 4), (1, 40, 0), (3, 21, 17), (1, 1, 0), (16, 1, 0), (5, 2, 1)]
# operations whose result for one number depends on that number alone, rounded as IEEE 754 says
ONE_BY_ONE = frozenset(
    {
        "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "abs", "relu",
        "clamp", "clamp_", "where", "masked_fill", "maximum", "minimum", "cat", "stack", "split",
        "split_with_sizes", "unbind", "view", "_unsafe_view", "reshape", "transpose", "permute",
        "t", "slice", "select", "expand", "clone", "copy_", "_to_copy", "unsqueeze", "squeeze",
        "alias", "detach", "new_zeros", "new_empty", "zeros", "empty", "zeros_like",
        "empty_like", "full", "ones", "lift_fresh", "scalar_tensor", "repeat",
    }
)  # fmt: skip


class OneByOne(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses other operations than `ONE_BY_ONE` outside of a fused body's known modules."""

    def __init__(self, fused: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fused = fused

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation.

        Raises:
            Unmeasured: it is not known to compute each row by itself.
        """
        name = function.overloadpacket.__name__
        if self.fused.depth == 0 and name not in ONE_BY_ONE:
            raise Unmeasured(f"a layer computes {name} of all jobs' rows")
        return function(*args, **(kwargs or {}))


def difference(fused: Any) -> str | None:
    """Return how passes over random rows differ from the body's own forward; None: they do not.

    Args:
        fused: a `FusedBody`, whose context is set.
    """
    segments = [_segment(fused, job, *shape) for job, shape in enumerate(SHAPES)]
    expected = []
    for s in segments:
        s.random.restore()
        with _embeddings(fused) as embedded:
            output = fused.reference(**s.arguments)
        expected.append((output, *_gradients([s], [output], embedded)))
    with OneByOne(fused):  # its results may differ: autocast acts in other places
        fused.forward(Pass([copy.copy(segments[0])], 0, None))
    for s, own in zip(segments, expected, strict=True):
        # these passes also show each layer the shape of its rows
        (output,) = fused.forward(Pass([copy.copy(s)], 0, None))
        if not _equal(s, output, own[0], fused.mode):
            return f"a pass over {list(s.input_ids_BS.shape)} random tokens differs"
    return _shared_difference(fused, segments, expected)


def _shared_difference(
    fused: Any, segments: list[Segment], expected: list[tuple[Any, ...]]
) -> str | None:
    copies = [copy.copy(s) for s in segments]
    with _embeddings(fused) as embedded:
        outputs = [output for p in fused.passes(copies) for output in fused.forward(p)]
    if all(s.kept is None for s in copies):
        fused.keeps_padding.add(fused.context)
    gradients = _gradients(segments, outputs, embedded)
    for i, (s, output) in enumerate(zip(segments, outputs, strict=True)):
        if not _equal(s, output, expected[i][0], fused.mode):
            return "a pass over several jobs' random tokens differs from the body's own forward"
        if gradients and not _same(gradients[i], expected[i][1], fused.mode):
            return "the gradients of several jobs' random tokens differ from the body's own"
    if fused.context.compute_state.grad:
        return None
    following = []  # the next token of each row, as in generation
    for i, (s, output) in enumerate(zip(segments, outputs, strict=True)):
        name = next((name for name in CACHES if getattr(output, name, None) is not None), None)
        if name is None:
            return None
        own = fused.reference(**_next(s, i), **{name: getattr(expected[i][0], name)})
        expected[i] = (own,)
        following.append(Segment(s.job, _next(s, i) | {name: getattr(output, name)}, s.random))
    outputs = [output for p in fused.passes(following) for output in fused.forward(p)]
    for s, output, (own,) in zip(following, outputs, expected, strict=True):
        if not _equal(s, output, own, fused.mode):
            return "a pass over several jobs' next tokens differs from the body's own forward"
    return None


@contextmanager
def _embeddings(fused: Any) -> Iterator[list[Tensor]]:
    """Collect the embeddings of each forward, with gradients where they are on."""
    embedded: list[Tensor] = []

    def collect(_module: Any, _inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            embedded.append(output.requires_grad_())

    handle = fused.reference.get_input_embeddings().register_forward_hook(collect)
    try:
        yield embedded
    finally:
        handle.remove()


def _gradients(
    segments: list[Segment], outputs: list[Any], embedded: list[Tensor]
) -> tuple[Tensor, ...]:
    """Return the gradients of random sums of all outputs but those of padding.

    Returns:
        The gradients of the embeddings; none where gradients are off.
    """
    if not embedded:
        return ()
    tensors, weights = [], []
    for s, output in zip(segments, outputs, strict=True):
        for x in tensors_of(output):
            if not x.requires_grad:
                continue
            drawn = torch.Generator(x.device).manual_seed(x.numel())
            weight = torch.randn(x.shape, generator=drawn, device=x.device).to(x.dtype)
            if s.attention_mask is not None and x.shape[:2] == s.attention_mask.shape:
                weight[s.attention_mask == 0] = 0
            tensors.append(x)
            weights.append(weight)
    modes = ComputeState.now()
    PLAIN.restore()  # backward runs outside autocast
    try:
        return torch.autograd.grad(tensors, embedded, weights)
    finally:
        modes.restore()


def _next(s: Segment, number: int) -> dict[str, Any]:
    ids = torch.full((s.input_ids_BS.shape[0], 1), 1 + number, device=s.input_ids_BS.device)
    assert s.attention_mask is not None
    mask = torch.cat([s.attention_mask, torch.ones_like(ids)], 1)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": True}


def _segment(fused: Any, job: int, b: int, length: int, padding: int) -> Segment:
    device, config = fused.reference.device, fused.reference.config.get_text_config()
    ids = torch.randint(config.vocab_size, (b, length), device=device)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    mask[-1, length - padding :] = 0
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    arguments["use_cache"] = not fused.context.compute_state.grad
    if hasattr(config, "output_router_logits"):  # of a mixture of experts, for its balance loss
        arguments["output_router_logits"] = True
    return Segment(-1 - job, arguments, RandomState.now())


def _equal(s: Segment, output: Any, expected: Any, mode: str) -> bool:
    ours, theirs = tensors_of(output), tensors_of(expected)
    return len(ours) == len(theirs) and all(
        _same(without_padding(s, a), without_padding(s, b), mode)
        for a, b in zip(ours, theirs, strict=True)
    )


def _same(a: Tensor, b: Tensor, mode: str) -> bool:
    return torch.equal(a, b) if mode == "exact" else torch.allclose(a, b, rtol=1e-2, atol=1e-2)
