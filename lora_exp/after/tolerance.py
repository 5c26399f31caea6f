"""What a merged model was found to differ by from its adapter, and whether that is rounding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lora_exp.after.rounding import TIMES

# what rounding of the merged weights can cause: the largest difference of a logit (in float32
# absolute, else as a share of the largest logit), and the smallest shares of equal top-1 tokens and
# of equal experts
TOLERANCE = {
    "float32": (1e-4, 1.0, 0.999), "bfloat16": (2e-2, 0.95, 0.9), "float16": (5e-3, 0.98, 0.97),
}  # fmt: skip
SUMS = 1e-3  # instead, where the models compute in float32: 4-bit layers cannot in float64
# of the adapter's effect on logits at most: else an unmerged base might pass, and where rounding
# had to be measured in float32, an update that is 1% too large, which changes twice as much
SHARE, EXACT_SHARE = 0.2, 0.005


@dataclass(frozen=True)
class Proof:
    """How far a merged model is from the adapter on its base, in logits."""

    prompts: int
    tokens: int  # positions compared: of the prompts, and of the adapter's answers
    max_difference: float
    mean_difference: float
    kl: float  # nats a token, of the merged model from the adapter
    top1_agreement: float
    same_text: float  # share of prompts whose greedy answers are equal
    same_experts: float | None  # share of the experts that routers chose; None: there is no router
    largest_logit: float
    effect: float  # the largest difference that the adapter makes
    dtype: str  # of the merged weights
    rounding: float  # the largest difference that rounding the weights makes; 0: not measured
    computed_in: str  # float64 if the models can: then only the merge differs, not the sums
    reference: str

    @property
    def fixed_tolerance(self) -> float:
        """The largest difference that passes on any architecture."""
        share, _, _ = TOLERANCE[self.dtype]
        if self.dtype == "float32":
            return share if self.computed_in == "float64" else SUMS
        return share * self.largest_logit

    @property
    def tolerance(self) -> float:
        """The largest difference that passes, for what rounding does on this architecture."""
        exact = self.dtype == "float32"
        allowed = min(TIMES * self.rounding, (EXACT_SHARE if exact else SHARE) * self.effect)
        largest = max(self.fixed_tolerance, allowed)
        return min(largest, SHARE * self.effect) if self.effect else largest

    @property
    def holds(self) -> bool:
        """Whether the merged model equals the adapter on its base."""
        _, top1_agreement, same_experts = TOLERANCE[self.dtype]
        return (
            self.max_difference <= self.tolerance
            and self.top1_agreement >= top1_agreement
            and (self.same_experts is None or self.same_experts >= same_experts)
        )

    @property
    def rounded_off(self) -> bool:
        """Whether it fails by no more than rounding to 16 bits alone does to this architecture.

        Not if it chooses other experts: with the adapter's replayed, its logits show nothing of it.
        """
        _, _, same_experts = TOLERANCE[self.dtype]
        is_rounding = self.max_difference <= TIMES * self.rounding
        is_rounding &= self.same_experts is None or self.same_experts >= same_experts
        return self.dtype != "float32" and is_rounding and not self.holds

    def values(self) -> dict[str, Any]:
        """All values, for JSON."""
        verdict = {"holds": self.holds, "rounded_off": self.rounded_off}
        return asdict(self) | {"tolerance": self.tolerance} | verdict
