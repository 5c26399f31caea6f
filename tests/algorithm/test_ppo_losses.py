"""PPO's formulas equal numbers calculated by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, tensor

from lora_exp.algorithm.ppo_losses import (
    adapted_beta,
    explained_variance,
    gae_advantages,
    kl_estimate,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

ALL = torch.ones(1, 3)


def assert_close(computed: Tensor, expected: list[list[float]] | float) -> None:
    torch.testing.assert_close(computed, tensor(expected))


def test_a_mean_is_over_the_tokens_of_the_mask() -> None:
    assert_close(masked_mean(tensor([[1.0, 2.0, 9.0]]), tensor([[1, 1, 0]])), 1.5)


def test_k1_is_the_log_ratio_and_k3_is_never_negative() -> None:
    p, q = tensor([[math.log(0.5), math.log(0.2)]]), tensor([[math.log(0.25), math.log(0.4)]])
    assert_close(kl_estimate(p, q, "k1"), [[math.log(2), -math.log(2)]])
    assert_close(kl_estimate(p, q, "k3"), [[0.5 - 1 + math.log(2), 2 - 1 - math.log(2)]])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_both_estimators_are_unbiased(estimator: str) -> None:
    p, q = tensor([0.5, 0.3, 0.2]), tensor([0.2, 0.2, 0.6])
    exact = (p * (p / q).log()).sum()
    assert_close((p * kl_estimate(p.log(), q.log(), estimator)).sum(), float(exact))  # type: ignore[arg-type]


def test_the_score_counts_at_the_last_token_and_the_kl_at_each() -> None:
    computed = token_rewards(tensor([2.0]), tensor([[0.1, 0.2, 0.0]]), tensor([[1, 1, 0]]), 0.5)
    assert_close(computed, [[-0.05, 1.9, 0.0]])


def test_advantages_equal_a_hand_calculation() -> None:
    # deltas 0.1, 0.1, 0.3; with lambda 0.5: 0.3, then 0.1 + 0.15, then 0.1 + 0.125
    computed = gae_advantages(tensor([[0.0, 0.0, 1.0]]), tensor([[0.5, 0.6, 0.7]]), ALL, 1.0, 0.5)
    assert_close(computed, [[0.225, 0.25, 0.3]])


def test_after_the_last_token_values_and_advantages_are_zero() -> None:
    mask = tensor([[1.0, 1.0, 0.0]])
    computed = gae_advantages(tensor([[0.0, 1.0, 0.0]]), tensor([[0.5, 0.6, 7.0]]), mask, 0.9, 0.5)
    assert_close(computed, [[0.9 * 0.6 - 0.5 + 0.45 * 0.4, 0.4, 0.0]])


def test_with_lambda_one_an_advantage_is_the_return_less_the_value() -> None:
    rewards, values = torch.randn(2, 5), torch.randn(2, 5)
    computed = gae_advantages(rewards, values, torch.ones(2, 5), 1.0, 1.0)
    torch.testing.assert_close(computed, rewards.flip(1).cumsum(1).flip(1) - values)


def test_whitening_equals_a_hand_calculation() -> None:
    third = math.sqrt(1.5)
    assert_close(whiten(tensor([[1.0, 2.0, 3.0]]), ALL), [[-third, 0.0, third]])
    with_mean = whiten(tensor([[1.0, 3.0, 50.0]]), tensor([[1.0, 1.0, 0.0]]), keep_mean=True)
    assert_close(with_mean, [[1.0, 3.0, 0.0]])


def test_the_ratio_is_clipped_only_where_that_lowers_the_objective() -> None:
    new = tensor([[1.5, 1.5, 0.5]]).log().requires_grad_()
    loss, clipped = policy_loss(new, torch.zeros(1, 3), tensor([[1.0, -1.0, 1.0]]), ALL, 0.2)
    assert_close(loss.detach(), (-1.2 + 1.5 - 0.5) / 3)
    assert_close(clipped, 1 / 3)
    loss.backward()
    assert new.grad is not None
    assert_close(new.grad, [[0.0, 0.5, -0.5 / 3]])


def test_a_values_error_is_the_larger_of_clipped_and_unclipped() -> None:
    # 1.0 is clipped to 0.5 + 0.2 = 0.7, 0.3 from its target; 0.6 is within the range, unclipped
    loss, clipped = value_loss(
        tensor([[1.0, 0.6, 0.0]]), tensor([[0.5, 0.5, 0.0]]), tensor([[1.0, 0.9, 0.0]]), ALL, 0.2
    )
    assert_close(loss, 0.5 * (0.09 + 0.09) / 3)
    assert_close(clipped, 1 / 3)


def test_explained_variance_is_one_for_exact_values_and_zero_for_a_constant() -> None:
    returns = tensor([[1.0, 2.0, 4.0]])
    assert_close(explained_variance(returns.clone(), returns, ALL), 1.0)
    assert_close(explained_variance(torch.full((1, 3), 7.0), returns, ALL), 0.0)


def test_beta_follows_the_kl_within_its_bounds() -> None:
    assert adapted_beta(0.1, kl=6.6, target=6.0, share=0.5) == pytest.approx(0.1 * 1.05)
    assert adapted_beta(0.1, kl=60.0, target=6.0, share=0.5) == pytest.approx(0.1 * 1.1)
    assert adapted_beta(0.1, kl=0.0, target=6.0, share=1.0) == pytest.approx(0.08)
