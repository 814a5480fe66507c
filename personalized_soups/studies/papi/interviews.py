"""Ask people about pairs of known statements, and predict how they order the unseen statements.

A person's answer to a pair comes from the person's own two ratings: the statement with the higher rating is better, and
equal ratings are a tie. The choice of a question sees only earlier answers.

Shapes: P = people, M = statements, N = answers, D = base rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from personalized_soups.studies.papi.basis import RatingBasis, learn_basis
from personalized_soups.studies.papi.ratings import Floats, Indices, Ratings
from personalized_soups.users.answers.items import ItemModel
from personalized_soups.users.answers.selection import Rule

_NUM_TARGETS = 2000  # pairs of unseen statements that stand for all of them when a question is chosen


@dataclass(frozen=True, slots=True)
class Answering:
    """How answers depend on rewards. Rewards have the unit of ratings.

    Attributes:
        scale: the margin of an answer for each unit of reward.
        threshold: the margin below which people rate two statements equally.
        own_share: the share of a statement's own part that also changes answers about the statement.
    """

    scale: float
    threshold: float
    own_share: float


# Simulated answers of known people choose one of these for each split.
CANDIDATES = (
    Answering(2.0, 1.0, 0.7),
    Answering(2.0, 1.0, 0.4),
    Answering(2.5, 1.2, 0.5),
)
_JUDGED_AFTER = (5, 10, 20)  # answers


@dataclass(frozen=True)
class Interviewer:
    """Asks people about pairs of statements.

    Attributes:
        basis: the base rewards, which are learned from other people.
        data: the statements. The ratings in it are not used.
        answering: how answers depend on rewards.
        seed: the seed of the random numbers.
    """

    basis: RatingBasis
    data: Ratings
    answering: Answering
    seed: int

    @cached_property
    def pairs(self) -> Indices:
        """[Q, 2]: all pairs of known statements, as places in `data.known`."""
        return np.stack(np.triu_indices(len(self.data.known), 1), axis=1)

    @cached_property
    def targets(self) -> Floats:
        """[T, D]: the differences of some pairs of unseen statements."""
        pairs = unseen_pairs(self.data)
        chosen = pairs[np.random.default_rng(self.seed).choice(len(pairs), min(_NUM_TARGETS, len(pairs)), False)]
        result: Floats = self.basis.features(chosen[:, 0].tolist()) - self.basis.features(chosen[:, 1].tolist())
        return result

    def weights(self, ratings_M: Floats, rule: Rule, num_questions: int, *, person: int = 0) -> Floats:
        """Return [N + 1, D]: a person's mean weights before the first answer, and after each of the answers.

        Args:
            ratings_M: the person's ratings of all statements. Only the ratings of asked statements are used.
            rule: how questions are chosen.
            num_questions: N.
            person: the number of the person, which seeds the rule `random`.
        """
        known, answering = self.data.known, self.answering
        model = ItemModel(
            self.basis.matrix[known],
            answering.own_share * self.basis.deviations[known],
            self.basis.prior,
            scale=answering.scale,
            threshold=answering.threshold,
        )
        rated = ~np.isnan(ratings_M[known])
        pairs = self.pairs[rated[self.pairs].all(axis=1)]  # a person without a rating of a statement is not asked
        rng = np.random.default_rng([self.seed, person])
        asked: list[int] = []
        labels: list[float] = []
        estimate = model.estimate(pairs[asked], np.array(labels))
        weights = [estimate.weights.mean]
        for _ in range(num_questions):
            asked.append(model.next_pair(estimate, pairs, asked=asked, rule=rule, rng=rng, targets_TD=self.targets))
            first, second = ratings_M[known[pairs[asked[-1]]]]
            labels.append(answer(first, second))
            estimate = model.estimate(pairs[asked], np.array(labels))
            weights.append(estimate.weights.mean)
        return np.stack(weights)


def answer(first: float, second: float) -> float:
    """Return the answer of a person with two ratings: 1 if the first is higher, 0 if it is lower, 0.5 if equal."""
    return 0.5 if first == second else float(first > second)


def unseen_pairs(data: Ratings) -> Indices:
    """Return all pairs of unseen statements, as indices of statements."""
    return data.unseen[np.stack(np.triu_indices(len(data.unseen), 1), axis=1)]


def ordered_share(scores_NM: Floats, ratings_M: Floats, pairs_Q2: Indices) -> Floats:
    """Return [N]: the share of pairs with different ratings that each row of scores orders as the ratings do.

    A pair with equal scores counts half.

    Args:
        scores_NM: scores of all statements.
        ratings_M: a person's ratings. Pairs with a missing rating do not count.
        pairs_Q2: the pairs.
    """
    difference = ratings_M[pairs_Q2[:, 0]] - ratings_M[pairs_Q2[:, 1]]
    counts = ~np.isnan(difference) & (difference != 0)
    pairs, sign = pairs_Q2[counts], np.sign(difference[counts])
    agreement = np.sign(scores_NM[:, pairs[:, 0]] - scores_NM[:, pairs[:, 1]]) * sign
    shares: Floats = (1 + agreement.mean(axis=1)) / 2
    return shares


def choose_answering(
    data: Ratings, known_people: Indices, *, num_rewards: int, seed: int, num_folds: int = 3, fold_size: int = 30
) -> Answering:
    """Return the candidate that predicts best for known people who are treated as new, after 5, 10 and 20 answers.

    In each fold, the basis is learned from the other known people. New people are not used.
    """
    pairs = unseen_pairs(data)
    shares = np.zeros(len(CANDIDATES))
    for fold in range(num_folds):
        held_out = known_people[fold * fold_size : (fold + 1) * fold_size]
        basis = learn_basis(data.ratings[np.setdiff1d(known_people, held_out)], num_rewards)
        for at, candidate in enumerate(CANDIDATES):
            interviewer = Interviewer(basis, data, candidate, seed)
            for person in held_out:
                weights = interviewer.weights(data.ratings[person], "prediction", _JUDGED_AFTER[-1], person=int(person))
                judged = weights[list(_JUDGED_AFTER)] @ basis.matrix.T
                shares[at] += ordered_share(judged, data.ratings[person], pairs).sum()
    return CANDIDATES[int(np.argmax(shares))]
