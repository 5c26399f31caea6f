"""PPO's formulas on plain tensors: divergence, advantages, clipped losses.

Shapes: B completions, T tokens of the longest; `mask_BT` is 1 where a completion has a token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lora_exp.parallel.world import world


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean over all tokens that the mask counts."""
    return (x_BT * mask_BT).sum() / mask_BT.sum()


def kl_estimate(logps_BT: Tensor, ref_logps_BT: Tensor, estimator: Literal["k1", "k3"]) -> Tensor:
    """Estimate KL(policy, reference) token by token from the sampled tokens alone, [B, T].

    `k1` is log(p/q), unbiased; `k3` is q/p - 1 - log(q/p), unbiased too, never negative and of less
    variance (J. Schulman, "Approximating KL divergence", 2020).
    """
    log_ratio = ref_logps_BT - logps_BT
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """Return each token's reward, [B, T]: -beta times its KL, plus the score at the last token.

    Section 2.2 of Ziegler et al. (arXiv 1909.08593).
    """
    rewards = -beta * kl_BT * mask_BT
    last = mask_BT.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], scores_B[:, None].to(rewards.dtype))


def gae_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> Tensor:
    """Return generalised advantage estimates, [B, T] (arXiv 1506.02438, equation 16).

    delta_t = r_t + gamma V_(t+1) - V_t and A_t = delta_t + gamma lam A_(t+1); after the last token
    V and A are 0.
    """
    values_BT = values_BT * mask_BT
    advantages, following = [], torch.zeros_like(values_BT[:, 0])
    for t in reversed(range(values_BT.shape[1])):
        next_value = (
            values_BT[:, t + 1] if t + 1 < values_BT.shape[1] else torch.zeros_like(following)
        )
        delta = rewards_BT[:, t] + gamma * next_value - values_BT[:, t]
        following = (delta + gamma * lam * following) * mask_BT[:, t]
        advantages.append(following)
    return torch.stack(advantages[::-1], 1)


def whiten(x_BT: Tensor, mask_BT: Tensor, keep_mean: bool = False) -> Tensor:
    """Scale to variance 1 and mean 0 (or the old mean) over the tokens that the mask counts.

    Of a run's several processes, over the tokens of all.
    """
    centre = _mean_of_all(x_BT, mask_BT)
    variance = _mean_of_all((x_BT - centre) ** 2, mask_BT)
    scaled = (x_BT - centre) * torch.rsqrt(variance + 1e-8)
    return (scaled + centre if keep_mean else scaled) * mask_BT


def _mean_of_all(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    if world.size == 1:
        return masked_mean(x_BT, mask_BT)
    mean: Tensor = world.total((x_BT * mask_BT).sum()) / world.total(mask_BT.sum())
    return mean


def policy_loss(
    logps_BT: Tensor, old_logps_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return the clipped policy loss (arXiv 1707.06347, equation 7) and the clipped share.

    A token counts as clipped if the loss uses its clipped term.
    """
    ratio = (logps_BT - old_logps_BT).exp()
    unclipped = -advantages_BT * ratio
    clipped = -advantages_BT * ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = masked_mean(torch.max(unclipped, clipped), mask_BT)
    return loss, masked_mean((clipped > unclipped).float(), mask_BT)


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return half the squared error, clipped around the old values, and the clipped share.

    The larger of the clipped and the unclipped error, as in the code of arXiv 1707.06347.
    """
    clipped_values = old_values_BT + (values_BT - old_values_BT).clamp(-epsilon, epsilon)
    unclipped, clipped = (values_BT - returns_BT) ** 2, (clipped_values - returns_BT) ** 2
    loss = 0.5 * masked_mean(torch.max(unclipped, clipped), mask_BT)
    return loss, masked_mean((clipped > unclipped).float(), mask_BT)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return 1 - Var(returns - values) / Var(returns): 1 is perfect, 0 no better than the mean."""
    counted = mask_BT.bool()
    returns, error = returns_BT[counted], (returns_BT - values_BT)[counted]
    return 1 - error.var(correction=0) / returns.var(correction=0).clamp_min(1e-8)


def adapted_beta(beta: float, kl: float, target: float, share: float) -> float:
    """Return the next beta: larger if the KL is above its target, smaller if below.

    beta (1 + clip(kl / target - 1, -0.2, 0.2) share), section 2.2 of arXiv 1909.08593.

    Args:
        beta: the current coefficient.
        kl: of the last rollout, summed over a completion, in nats.
        target: the KL to aim for.
        share: the rollout's completions divided by the horizon.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return beta * (1 + error * share)
