"""The mixtures of rewards and the weights of Bone Soups, against the identity that defines them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalized_soups.errors import UsageError
from personalized_soups.systems.bone_soups.mixing import BETAS, backbone_rewards, backbone_weights, mixing_matrix


@given(
    num=st.integers(min_value=2, max_value=8),
    share=st.floats(min_value=0.05, max_value=1.0),
    seed=st.integers(min_value=0, max_value=999),
)
def test_the_weighted_mixtures_add_up_to_the_users_reward(num: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    beta = 1 / num + share * (1 - 1 / num)
    names = [f"r{number}" for number in range(num)]
    preference = dict(zip(names, rng.normal(size=num).tolist(), strict=True))
    rewards = dict(zip(names, rng.normal(size=num).tolist(), strict=True))  # of some answer
    mixtures = backbone_rewards(names, beta)
    weights = backbone_weights(preference, beta)
    total = sum(
        weights[backbone] * sum(weight * rewards[name] for name, weight in mixture.items())
        for backbone, mixture in mixtures.items()
    )
    wanted = sum(preference[name] * rewards[name] for name in names)
    # the condition of K is 1 / (beta - (1 - beta) / (n - 1)) = 1 / share here, times rounding of 1e-12 in the mixtures
    assert total == pytest.approx(wanted, abs=1e-9 / share)


def test_with_beta_one_it_is_rewarded_soups() -> None:
    preference = {"a": 0.2, "b": -0.5, "c": 1.0}
    assert backbone_weights(preference, 1.0) == pytest.approx(preference)
    assert backbone_rewards(list("abc"), 1.0)["b"] == {"a": 0.0, "b": 1.0, "c": 0.0}


def test_each_row_of_the_matrix_is_a_mixture_and_the_matrix_is_circulant() -> None:
    for beta in BETAS:
        matrix = mixing_matrix(4, beta)
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0)
        for shift in range(4):
            np.testing.assert_array_equal(np.roll(matrix[0], shift), matrix[shift])


@pytest.mark.parametrize("beta", BETAS)
def test_with_opposed_rewards_a_backbone_is_a_rescaled_expert(beta: float) -> None:
    """Six rewards in three opposed pairs add up to 0, so the mixture of a backbone is a multiple of its own reward."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=3)
    rewards = np.concatenate([scores, -scores])
    mixtures = mixing_matrix(6, beta) @ rewards
    np.testing.assert_allclose(mixtures, (beta - (1 - beta) / 5) * rewards)


def test_a_low_side_has_a_negative_weight() -> None:
    weights = backbone_weights({"expert": -1.0, "informative": 1.0, "friendly": 1.0}, 0.7)
    assert weights["expert"] < 0 < weights["informative"]
    assert sum(weights.values()) == pytest.approx(1.0)  # rows and columns of K add up to 1


@pytest.mark.parametrize(("num", "beta"), [(3, 1 / 3), (3, 0.2), (3, 1.01), (2, 0.5), (0, 1.0), (1, 0.5)])
def test_other_values_are_rejected(num: int, beta: float) -> None:
    with pytest.raises(UsageError):
        mixing_matrix(num, beta)


def test_one_reward_is_its_own_backbone_and_a_repeated_one_is_rejected() -> None:
    assert backbone_rewards(["a"], 1.0) == {"a": {"a": 1.0}}
    with pytest.raises(UsageError, match="repeated"):
        backbone_rewards(["a", "a"], 0.8)
