"""Estimate a user's weights where questions share items, such as the statements of a questionnaire.

Base rewards explain an item's reward only in part: `r_i = w . phi_i + e_i`. If a user compares an item with several
others, the item's own part `e_i` enters each of these answers, so the answers are not independent given the weights.
`ItemModel` therefore estimates the own parts of the compared items together with the weights, so a second question
about an item is worth less than a first. Without this, the active rules ask about the same few items again and again.

Shapes: M = items, Q = possible pairs, N = answers, A = items that were compared, D = base rewards, T = target pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.estimate import Estimate, estimate_weights
from personalized_soups.users.answers.prior import Floats, GaussianPrior
from personalized_soups.users.answers.selection import Rule, open_targets
from personalized_soups.users.answers.ties import expected_information, tie_rows

Pairs = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class ItemEstimate:
    """What is known of a user after some answers.

    Attributes:
        weights: the estimate of the reward weights.
        rewards: [M], the mean reward of each item, with the item's own part.
        covariance: [M, M], the covariance of the items' rewards.
        cross: [D, M], the covariance of the weights and the items' rewards.
    """

    weights: Estimate
    rewards: Floats
    covariance: Floats
    cross: Floats


@dataclass(frozen=True, slots=True)
class ItemModel:
    """The items that a user may be asked to compare, and how the user answers.

    Attributes:
        features: [M, D], float64, the base rewards of each item.
        deviations: [M], the variance of each item's own part, at least 0.
        prior: the prior of the weights.
        scale: the margin of an answer for each unit of reward.
        threshold: the margin below which a user calls a tie. See `ties`.

    Example:
        >>> model = ItemModel(np.eye(2), np.array([0.1, 0.1]), GaussianPrior.ridge(2), scale=2.0, threshold=0.5)
        >>> estimate = model.estimate(np.array([[0, 1]]), np.array([1.0]))
        >>> bool(estimate.rewards[0] > estimate.rewards[1])
        True
    """

    features: Floats
    deviations: Floats
    prior: GaussianPrior
    scale: float = 1.0
    threshold: float = 0.0

    def estimate(self, pairs_N2: Pairs, labels_N: Floats) -> ItemEstimate:
        """Return the estimate after N answers.

        Args:
            pairs_N2: the two items of each answer, as indices.
            labels_N: 1 if the first item is better, 0 if the second item is better, 0.5 for a tie.
        """
        pairs = np.asarray(pairs_N2, dtype=np.intp).reshape(-1, 2)
        num_rewards = self.features.shape[1]
        compared, columns = np.unique(pairs, return_inverse=True)
        columns = columns.reshape(-1, 2)
        # Each compared item has one more feature: its own part, in units of its standard deviation.
        own_MA = np.zeros((len(self.features), len(compared)))
        own_MA[compared, np.arange(len(compared))] = np.sqrt(self.deviations[compared])
        design = np.concatenate([self.features, own_MA], axis=1)
        rows = tie_rows(self.scale * (design[pairs[:, 0]] - design[pairs[:, 1]]), labels_N, self.threshold)
        num = num_rewards + len(compared)
        covariance = np.eye(num)
        covariance[:num_rewards, :num_rewards] = self.prior.covariance
        mean = np.concatenate([self.prior.mean, np.zeros(len(compared))])
        joint = estimate_weights(rows.differences, rows.labels, GaussianPrior(mean, covariance), offsets_N=rows.offsets)
        reach = joint.covariance @ design.T
        rewards = design @ reach
        rest = self.deviations.copy()  # the own parts of items that were not compared keep their prior variances
        rest[compared] = 0.0
        rewards[np.diag_indices_from(rewards)] += rest
        weights = Estimate(joint.mean[:num_rewards], joint.covariance[:num_rewards, :num_rewards], len(pairs))
        return ItemEstimate(weights, design @ joint.mean, rewards, reach[:num_rewards])

    def scores(
        self,
        estimate: ItemEstimate,
        pairs_Q2: Pairs,
        rule: Rule,
        rng: np.random.Generator,
        *,
        targets_TD: npt.ArrayLike,
    ) -> Floats:
        """Return [Q]: how much each pair is worth. The rules are those of `selection.question_scores`.

        Args:
            estimate: the estimate after the answers so far.
            pairs_Q2: the possible pairs.
            rule: any rule but `thompson`.
            rng: the generator of random numbers, used by `random`.
            targets_TD: the differences of the pairs whose answers are to be predicted, for `prediction`. The own parts
                of their items are not predicted.
        """
        if rule == "random":
            return rng.random(len(pairs_Q2))
        if rule == "thompson":
            raise ValueError("the rule 'thompson' is not available for items")
        a, b = pairs_Q2[:, 0], pairs_Q2[:, 1]
        information = expected_information(self.scale * (estimate.rewards[a] - estimate.rewards[b]), self.threshold)
        single = np.diagonal(estimate.covariance)
        variance = self.scale**2 * np.maximum(single[a] + single[b] - 2 * estimate.covariance[a, b], 0.0)
        if rule == "variance":
            return information**2 * variance
        if rule == "information":
            return np.log1p(information * variance)
        root = np.linalg.cholesky(open_targets(estimate.weights, targets_TD) + 1e-12 * np.eye(len(estimate.cross)))
        reach = root.T @ estimate.cross
        gain = self.scale**2 * np.sum((reach[:, a] - reach[:, b]) ** 2, axis=0)
        scores: Floats = information * gain / (1 + information * variance)
        return scores

    def next_pair(
        self,
        estimate: ItemEstimate,
        pairs_Q2: Pairs,
        *,
        asked: Sequence[int],
        rule: Rule,
        rng: np.random.Generator,
        targets_TD: npt.ArrayLike,
    ) -> int:
        """Return the index of the pair to ask next. No pair is asked twice.

        Raises:
            ValueError: if every pair was asked.
        """
        if len(asked) == len(pairs_Q2):
            raise ValueError("every pair was asked")
        scores = self.scores(estimate, pairs_Q2, rule, rng, targets_TD=targets_TD)
        scores[list(asked)] = -np.inf
        return int(np.argmax(scores))
