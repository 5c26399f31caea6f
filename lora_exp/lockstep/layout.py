"""How segments are laid out: in one pass or several, with padding or without it, and filling."""

from __future__ import annotations

from functools import partial
from typing import Any

from lora_exp.lockstep.classes import LayerSignature
from lora_exp.lockstep.eligibility import preserved_random_state
from lora_exp.lockstep.products import Group, Sizes, group, on_grid
from lora_exp.lockstep.segment import LayerGroups, Pass, PassContext, Segment

Groupings = tuple[LayerGroups | None, ...]  # by layer
MAX_GROUPINGS = 1000  # combinations of numbers of rows whose groups are cached
MAX_TOTALS = 64  # different lengths of passes; beyond these, lengths are rounded up to a grid
# of the tokens of a pass: else its padding stays, since moving rows costs time, and in bodies that
# are narrower than WIDE as much as their products
MOST_KEPT, MOST_KEPT_NARROW, WIDE = 0.9, 0.7, 512


class Layout:
    """Lays out segments for a `FusedBody`, so that each keeps the bits that it has alone.

    A row's bits depend on the class of the number of rows in its product. So a pass may be longer
    than its tokens (filling), or shorter (without padding), if its class is that of each segment
    with its padding: nothing reads padding, and attention masks it.
    """

    def __init__(self, body: Any) -> None:
        """Create it for a `FusedBody`, whose context it reads."""
        self.body = body
        width = body.body.config.get_text_config().hidden_size
        self.most_kept = MOST_KEPT if width >= WIDE else MOST_KEPT_NARROW
        # by context and numbers of rows: the filling, and the groups of each layer
        self.groupings: dict[tuple[PassContext, Sizes, Sizes], tuple[int, Groupings]] = {}
        self.totals: set[int] = set()

    def passes(self, segments: list[Segment]) -> list[Pass]:
        """Return the passes for segments of the current context: one pass, if the norms allow it.

        New numbers of rows are measured here. Padding is left out where that saves enough.
        """
        for s in segments:
            s.kept = None
        if self.body.mode == "bmm":
            return [Pass(segments, 0, None)]
        if p := self._without_padding(segments):
            return [p]
        p = self._shared(segments) if len(segments) > 1 else None
        return [p] if p else [Pass([s], 0, None) for s in segments]

    def _without_padding(self, segments: list[Segment]) -> Pass | None:
        """Return one pass that leaves out padding; None: it may not, or saves little."""
        context = self.body.context
        may = self.body.attends_only and not self.body.own_layers[context]
        if not may or context in self.body.keeps_padding:
            return None
        for s in segments:
            if s.job not in self.body.reads_padding:
                s.leave_out_padding()
        is_proof = segments[0].job < 0  # it leaves out what it can
        most = (1 if is_proof else self.most_kept) * sum(s.own_tokens for s in segments)
        p = self._shared(segments) if sum(s.tokens for s in segments) <= most else None
        if p is not None and p.most_rows <= most:
            return p
        for s in segments:
            s.kept = None
        return None

    def _shared(self, segments: list[Segment]) -> Pass | None:
        """Return one pass for segments of the current context; None: a norm would not be exact."""
        context: PassContext = self.body.context
        sizes, own_sizes = zip(*((s.tokens, s.own_tokens) for s in segments), strict=True)
        key = context, sizes, own_sizes
        if key not in self.groupings:
            total = sum(sizes)
            many = total not in self.totals and len(self.totals) >= MAX_TOTALS
            if many or sizes != own_sizes:
                total = on_grid(total)
            self.totals.add(total)
            with preserved_random_state():
                groupings = self._groupings(context, sizes, own_sizes, total)
            if len(self.groupings) >= MAX_GROUPINGS:
                self.groupings.clear()
            self.groupings[key] = total - sum(sizes), groupings
        filling, groupings = self.groupings[key]
        rows = sum(sizes) + filling
        for layer, layer_groups in zip(self.body.layers, groupings, strict=True):
            whole = Group(tuple(range(len(segments))), rows)
            if layer_groups is None or layer_groups.groups == (whole,):
                continue
            if not layer_groups.groups or not layer.divisible:
                return None
            if layer.signatures[context].heads_first:
                return None
        return Pass(segments, filling, groupings)

    def _groupings(
        self, context: PassContext, sizes: Sizes, own_sizes: Sizes, total: int
    ) -> Groupings:
        groupings: dict[LayerSignature | None, LayerGroups | None] = {None: None}
        signatures = [layer.signatures.get(context) for layer in self.body.layers]
        for layer, signature in zip(self.body.layers, signatures, strict=True):
            if signature is not None and signature not in groupings:
                class_of = partial(self.body.classes.class_of, signature, layer.base)
                groupings[signature] = LayerGroups(
                    signature.dtype, group(sizes, total, class_of, own_sizes)
                )
        return tuple(groupings[signature] for signature in signatures)
