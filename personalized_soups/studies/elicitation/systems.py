"""Ask simulated users, and predict their rewards with each system.

Shapes: U = users, Q = questions, M = held-out answers, D = base rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from personalized_soups.studies.elicitation.world import Floats, World
from personalized_soups.systems.preference_models import Comparisons, PreferenceModel
from personalized_soups.users.answers.estimate import Estimate, estimate_weights
from personalized_soups.users.answers.prior import GaussianPrior
from personalized_soups.users.answers.propagation import propagate
from personalized_soups.users.answers.selection import Rule, next_question

COUNTS = (2, 5, 10, 20, 40)

# Answers a question, given its index and the number of earlier answers: 1 for `a`, 0 for `b`, 0.5 for a tie.
Answerer = Callable[[int, int], float]


@dataclass(frozen=True, slots=True)
class Guess:
    """What a system says of one user after some answers.

    Attributes:
        held: [M], the predicted rewards of the held-out answers.
        estimate: the estimate of the weights of the experts' rewards, from which a merge is made.
    """

    held: Floats
    estimate: Estimate


def ask(
    answerer: Answerer,
    differences_QD: Floats,
    prior: GaussianPrior,
    prompts: Sequence[str],
    *,
    rule: Rule,
    rng: np.random.Generator,
    num_questions: int = COUNTS[-1],
) -> tuple[list[int], list[float], dict[int, Estimate]]:
    """Ask one user, and return the questions, the answers, and the estimate after each number of answers in COUNTS.

    Weights are estimated as in a session, but without a preference for a position, which simulated users do not have.

    Raises:
        ValueError: if there are fewer questions than `num_questions`.
    """
    asked: list[int] = []
    labels: list[float] = []
    estimates = {}
    estimate = propagate(np.zeros((0, len(prior.mean))), [], prior)
    for count in range(1, num_questions + 1):
        index = next_question(estimate, differences_QD, asked=asked, prompts=prompts, rule=rule, rng=rng)
        if index is None:
            raise ValueError(f"{len(differences_QD)} questions are fewer than {num_questions}")
        labels.append(answerer(index, len(asked)))
        asked.append(index)
        estimate = propagate(differences_QD[asked], labels, prior)
        if count in COUNTS:
            estimates[count] = estimate
    return asked, labels, estimates


def implicit_guesses(
    world: World, answerer: Answerer, prior: GaussianPrior, *, rule: Rule, seed: Sequence[int]
) -> tuple[dict[int, Guess], list[int], list[float]]:
    """Return the guesses from the experts' implicit rewards, and the questions with the answers."""
    asked, labels, estimates = ask(
        answerer, world.pool.differences, prior, world.pool.prompts, rule=rule, rng=np.random.default_rng(list(seed))
    )
    guesses = {count: Guess(world.implicit @ estimate.mean, estimate) for count, estimate in estimates.items()}
    return guesses, asked, labels


def model_guesses(
    world: World, model: PreferenceModel, asked: Sequence[int], labels: Sequence[float]
) -> dict[int, Guess]:
    """Return the guesses of a system that learns rewards of hidden features from known users, for a user's answers.

    A merge needs weights of experts. They are the projection of the predicted reward of the questions' answers onto the
    experts' rewards.
    """
    num = len(world.pool)
    guesses = {}
    for count in COUNTS:
        if count > len(asked):
            break
        places = np.array(asked[:count])
        comparisons = Comparisons(world.hidden, places, num + places, np.array(labels[:count]))
        rewards = model.new_user(comparisons).rewards(world.hidden)
        guesses[count] = Guess(rewards[2 * num :], projected(world, rewards[:num] - rewards[num : 2 * num]))
    return guesses


def projected(world: World, margins_Q: Floats) -> Estimate:
    """Return the weights of experts whose margins are nearest to the given margins of the questions, without doubt."""
    differences = world.pool.differences
    gram = differences.T @ differences
    ridge = 1e-3 * np.trace(gram) / len(gram)  # opposite sides are nearly collinear
    weights = np.linalg.solve(gram + ridge * np.eye(len(gram)), differences.T @ margins_Q)
    return Estimate(weights, 1e-12 * max(1.0, float(weights @ weights)) * np.eye(len(weights)), len(margins_Q))


def known_comparisons(world: World, weights_UK: Floats, *, per_user: int, rng: np.random.Generator) -> Comparisons:
    """Return the comparisons of known users, who each answer random questions of the pool without error."""
    num = len(world.pool)
    places, labels, users = [], [], []
    for user, weights in enumerate(weights_UK):
        chosen = rng.choice(num, size=min(per_user, num), replace=False)
        places.append(chosen)
        labels.append((1 + np.sign(world.question_scores[chosen] @ weights)) / 2)
        users.append(np.full(len(chosen), user))
    index = np.concatenate(places)
    return Comparisons(world.hidden, index, num + index, np.concatenate(labels), np.concatenate(users))


def fitted_prior(world: World, weights_UK: Floats, *, per_user: int, rng: np.random.Generator) -> GaussianPrior:
    """Return the prior of the experts' rewards' weights, fitted on known users' estimated weights."""
    estimates = []
    for weights in weights_UK:
        chosen = rng.choice(len(world.pool), size=min(per_user, len(world.pool)), replace=False)
        labels = (1 + np.sign(world.question_scores[chosen] @ weights)) / 2
        # a wide prior: known users' answers are without error, so their weights are large
        wide = GaussianPrior(world.pool.prior.mean, _WIDE * world.pool.prior.covariance)
        estimates.append(estimate_weights(world.pool.differences[chosen], labels, wide).mean)
    return GaussianPrior.fit(np.stack(estimates))


_WIDE = 16.0


def agreement(world: World, held_M: Floats, truth_M: Floats) -> float:
    """Return the share of held-out pairs that predicted rewards order as the true rewards do.

    Pairs with equal true rewards do not count. Equal predicted rewards count half.
    """
    first, second = world.pairs.T
    truth = truth_M[first] - truth_M[second]
    counts = np.abs(truth) > 1e-9
    signs = np.sign(held_M[first] - held_M[second])[counts] * np.sign(truth[counts])
    return float((1 + signs.mean()) / 2)
