"""Predict how often a user prefers the soup's answers to the base's, from answers that both give to some prompts."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.declare.profile import Profile
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.base_rewards import BaseRewards, TextItem
from personalized_soups.users.answers.estimate import Estimate
from personalized_soups.users.answers.win_rate import WinRate, predicted_win_rate


def soup_win_rate(
    model: SoupModel,
    rewards: BaseRewards[TextItem],
    estimate: Estimate,
    profile: Profile,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    level: float = 0.9,
    seed: int = 0,
) -> WinRate:
    """Return the predicted win rate of a profile's soup against the base, with an interval.

    The soup and the base answer each prompt with their likeliest tokens, in one batch. If both give the same answer,
    the prompt counts as a tie.

    Args:
        model: the base with the experts of the profile.
        rewards: the base rewards that the estimate's weights belong to.
        estimate: the estimate of the user's weights.
        profile: the user's profile.
        prompts: at least one prompt.
        max_new_tokens: the maximum length of an answer, in tokens.
        level: the probability of the interval, in (0, 1).
        seed: the seed of the interval's samples.

    Raises:
        ValueError: if there are no prompts.
        SoupError: if the profile does not fit the experts, or the batch does not fit on the GPU.
    """
    num = len(prompts)
    if not num:
        raise ValueError("a win rate needs at least one prompt")
    answers: list[str] = model.generate(
        [*prompts, *prompts],
        [*[profile] * num, *[None] * num],
        max_new_tokens=max_new_tokens,
        batch_size=2 * num,
    )
    items = [TextItem(prompt, answer) for prompt, answer in zip([*prompts, *prompts], answers, strict=True)]
    features = rewards.features(items)
    return predicted_win_rate(estimate, features[:num] - features[num:], level=level, seed=seed)
