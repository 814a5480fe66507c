"""Fit the prior of reward weights on the answers of known users, so that a new user needs fewer answers.

Shapes: U = known users, N = answers of one user, D = base rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field, ValidationError

from personalized_soups.declare.evidence import Answer, Text
from personalized_soups.errors import InputError
from personalized_soups.users.answers.estimate import estimate_weights
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.answers.prior import Floats, GaussianPrior

_MAX_STEPS = 200
_TOLERANCE = 1e-4


class KnownAnswer(Answer):
    """A known user's answer to a question of a pool.

    Example:
        >>> KnownAnswer(user="u1", question="q001", choice="a").label
        1.0
    """

    user: Text = Field(description="The name of the user.")


def read_known_answers(path: Path, pool: QuestionPool) -> dict[str, list[KnownAnswer]]:
    """Return the answers of each user in a JSON Lines file. The last answer to a question counts.

    Raises:
        InputError: if the file cannot be read, or a line is not the answer to a question of the pool.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"the answers cannot be read: {error.strerror}", where=str(path), mend="check the path"
        ) from error
    known = {question.id for question in pool.questions}
    answers: dict[tuple[str, str], KnownAnswer] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            answer = KnownAnswer.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "the line"
            raise InputError(
                f"the line is not an answer: {key}: {first['msg']}",
                where=where,
                mend='write {"user": "u1", "question": "q001", "choice": "a"}; a choice is a, b, tie or skip',
            ) from None
        if answer.question not in known:
            raise InputError(
                f"the pool has no question {answer.question!r}",
                where=where,
                mend="give answers to this pool: the ids of another pool belong to other questions",
            )
        answers[answer.user, answer.question] = answer
    by_user: dict[str, list[KnownAnswer]] = {}
    for (user, _), answer in answers.items():
        by_user.setdefault(user, []).append(answer)
    return by_user


def fit_known_users(pool: QuestionPool, answers: Mapping[str, Sequence[KnownAnswer]]) -> QuestionPool:
    """Return the pool with a prior that is fitted on the answers of known users. See `fit_prior`.

    Raises:
        InputError: if fewer than two users have answered a question. Skipped questions do not count.
    """
    evidence = []
    for of_user in answers.values():
        labelled = [(pool.index(answer.question), answer.label) for answer in of_user if answer.label is not None]
        if labelled:
            indices, labels = zip(*labelled, strict=True)
            evidence.append((pool.differences[list(indices)], np.array(labels, dtype=np.float64)))
    if len(evidence) < 2:
        raise InputError(
            f"only {len(evidence)} users have answered a question, but a prior needs at least 2",
            where="known",
            mend="give the answers of more users, or keep the prior of the pool",
        )
    num_answers = sum(len(labels) for _, labels in evidence)
    prior = fit_prior(evidence, pool.prior)
    return pool.with_prior(prior, kind="known users", num_users=len(evidence), num_answers=num_answers)


def fit_prior(evidence: Sequence[tuple[Floats, Floats]], start: GaussianPrior) -> GaussianPrior:
    """Return the normal distribution from which the users' weights were most likely drawn (empirical Bayes).

    Expectation maximisation: the posterior of each user's weights is a normal distribution with mean m_u and covariance
    C_u (Laplace's method). Then the mean becomes `m = mean_u m_u`, and the covariance becomes

        (sum_u (C_u + (m_u - m)(m_u - m)') + (D + 2) S) / (U + D + 2)

    with the covariance S of `start`. The covariance of the estimates m_u alone would be too small, because each
    estimate is drawn towards the prior. The term with S (an inverse Wishart prior) counts as much as D + 2 users. It
    keeps the covariance finite for users without noise, whose answers do not fix the scale of the weights.

    Laplace's method still gives a mean and a covariance that are somewhat small if users gave few answers. For 150
    simulated users, the diagonal of the covariance was about 30% too small with 20 answers, and 10% with 60.

    Args:
        evidence: the differences [N, D] and the labels [N] of each user's answers.
        start: the prior to start from.

    Raises:
        ValueError: if there are no users, or if `estimate_weights` raises it.
    """
    if not evidence:
        raise ValueError("there are no users")
    num_rewards = len(start.mean)
    prior, weight = start, num_rewards + 2
    for _ in range(_MAX_STEPS):
        estimates = [estimate_weights(differences, labels, prior) for differences, labels in evidence]
        means_UD = np.stack([estimate.mean for estimate in estimates])
        mean = means_UD.mean(axis=0)
        centred = means_UD - mean
        scatter = centred.T @ centred + sum(estimate.covariance for estimate in estimates)
        covariance = (scatter + weight * start.covariance) / (len(evidence) + weight)
        # The change is measured in units of the prior's deviations, so it does not depend on the scale of the rewards.
        root = np.linalg.inv(np.linalg.cholesky(prior.covariance))
        change = max(
            float(np.abs(root @ (mean - prior.mean)).max()),
            float(np.abs(root @ covariance @ root.T - np.eye(num_rewards)).max()),
        )
        prior = GaussianPrior(mean, (covariance + covariance.T) / 2)
        if change < _TOLERANCE:
            break
    return prior
