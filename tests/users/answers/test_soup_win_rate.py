from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from personalized_soups.declare.profile import Profile
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.implicit_rewards import ImplicitRewards
from personalized_soups.users.answers.estimate import Estimate
from personalized_soups.users.answers.soup_win_rate import soup_win_rate
from tests.experts import write_expert

PROMPTS = ["wash the kettle", "how do I rub it dry?", "soap", "is it nice again?"]


@pytest.fixture
def model(small_base: Path, tmp_path: Path) -> SoupModel:
    for seed, name in enumerate(("friendly", "concise")):
        write_expert(tmp_path / "experts" / name, seed=seed)
    return SoupModel.from_pretrained(small_base, tmp_path / "experts", device="cpu", same_base=True)


def _certain(weights: list[float]) -> Estimate:
    return Estimate(np.array(weights), np.eye(len(weights)) * 1e-18, num_answers=10)


def test_the_win_rate_is_that_of_answers_generated_one_by_one(model: SoupModel) -> None:
    rewards = ImplicitRewards(model)
    profile = Profile(weights={"friendly": 1.0, "concise": 0.5})
    weights = [0.3, -0.2]  # of concise and friendly, in the order of the rewards' names
    win_rate = soup_win_rate(model, rewards, _certain(weights), profile, PROMPTS, max_new_tokens=12)

    shares = []
    for prompt in PROMPTS:
        margin = 0.0
        for sign, chosen in ((1, profile), (-1, None)):
            (answer,) = model.generate([prompt], [chosen], max_new_tokens=12)
            margin += sign * float(rewards.features([TextItem(prompt, answer)])[0] @ weights)
        shares.append(1 / (1 + np.exp(-margin)))
    assert abs(float(np.mean(shares)) - 0.5) > 0.01  # else turning soup and base around would not be noticed
    # rewards are sums of float32 log-probabilities, which depend on the batch in the last digits
    assert win_rate.mean == pytest.approx(np.mean(shares), abs=1e-4)
    # the weights are certain, so the interval is that of the bootstrap over prompts, and the shares bound it
    assert min(shares) - 1e-4 <= win_rate.low < win_rate.mean < win_rate.high <= max(shares) + 1e-4


def test_equal_answers_are_ties(model: SoupModel) -> None:
    almost_the_base = Profile(weights={"friendly": 1e-12})
    win_rate = soup_win_rate(
        model, ImplicitRewards(model), _certain([5.0, 5.0]), almost_the_base, PROMPTS, max_new_tokens=4
    )
    assert win_rate == pytest.approx((0.5, 0.5, 0.5), abs=1e-3)


def test_a_win_rate_needs_a_prompt(model: SoupModel) -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        soup_win_rate(model, ImplicitRewards(model), _certain([1.0, 1.0]), Profile(weights={"friendly": 1.0}), [])
