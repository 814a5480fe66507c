"""Choose the question to ask next.

Shapes: Q = questions of a pool, T = target questions, D = base rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.estimate import Estimate, sigmoid
from personalized_soups.users.answers.prior import Floats

Rule: TypeAlias = Literal["variance", "information", "prediction", "thompson", "random"]


def question_scores(
    estimate: Estimate,
    differences_QD: npt.ArrayLike,
    rule: Rule,
    rng: np.random.Generator,
    *,
    targets_TD: npt.ArrayLike | None = None,
) -> Floats:
    """Return [Q]: how much each question is worth. A higher score is better.

    With `g = sigmoid'(w . v)` and the estimate's covariance C, the rules are:

    - `variance`: `g^2 v'Cv`, the variance of the predicted probability (PReF's reference code, arXiv:2503.06358);
    - `information`: `log(1 + g v'Cv)`, the growth of the log determinant of the precision (D-optimal design);
    - `prediction`: `g v'CMCv / (1 + g v'Cv)` with M from `open_targets`: how much the variances of the target questions
      shrink, where a target counts more if its answer is still open (I-optimal design for the targets);
    - `thompson`: `-|w~ . v| / sqrt(v'v)` for weights `w~` drawn from the estimate: asks about the closest call;
    - `random`: a random number.

    Args:
        estimate: the estimate after the answers so far.
        differences_QD: `phi(a) - phi(b)` of each question.
        rule: the rule.
        rng: the generator of random numbers, used by `thompson` and `random`.
        targets_TD: the differences of the questions whose answers are to be predicted, for `prediction`. They need not
            be in the pool. By default, they are the pool's questions.
    """
    differences = np.asarray(differences_QD, dtype=np.float64)
    if rule == "random":
        return rng.random(len(differences))
    if rule == "thompson":
        weights = estimate.samples(1, rng)[0]
        norms = np.linalg.norm(differences, axis=1)
        scores: Floats = -np.abs(differences @ weights) / np.where(norms > 0, norms, 1.0)
        return np.where(norms > 0, scores, -np.inf)
    margins = differences @ estimate.mean
    slopes = sigmoid(margins) * sigmoid(-margins)
    variance: Floats = np.maximum(np.einsum("qd,de,qe->q", differences, estimate.covariance, differences), 0.0)
    if rule == "variance":
        return slopes**2 * variance
    if rule == "prediction":
        matrix = open_targets(estimate, differences if targets_TD is None else targets_TD)
        reach = differences @ estimate.covariance
        shrunk: Floats = np.einsum("qd,de,qe->q", reach, matrix, reach)
        return slopes * shrunk / (1 + slopes * variance)
    return np.log1p(slopes * variance)


def open_targets(estimate: Estimate, targets_TD: npt.ArrayLike) -> Floats:
    """Return M, [D, D]: the mean over targets of `p v v'`, where p is the density at 0 of the target's margin.

    For a margin with mean m and variance s^2, `p = exp(-m^2 / 2 s^2) / s`, up to a constant. A target whose order is
    settled has a small density, so a question that would only make it more certain is worth little.
    """
    targets = np.asarray(targets_TD, dtype=np.float64)
    variance = np.sum((targets @ estimate.covariance) * targets, axis=1)
    is_open = variance > 1e-300  # other targets have no difference in any reward
    spread = np.where(is_open, variance, 1.0)
    density = np.where(is_open, np.exp(-((targets @ estimate.mean) ** 2) / (2 * spread)) / np.sqrt(spread), 0.0)
    matrix: Floats = (targets.T * density) @ targets / max(1, len(targets))
    return matrix


def next_question(
    estimate: Estimate,
    differences_QD: npt.ArrayLike,
    *,
    asked: Sequence[int] = (),
    prompts: Sequence[str] | None = None,
    rule: Rule = "prediction",
    rng: np.random.Generator | None = None,
    targets_TD: npt.ArrayLike | None = None,
) -> int | None:
    """Return the index of the question to ask next, or None if every question was asked.

    A question is never asked twice. A prompt is used again only after every prompt was used equally often, so a user
    does not read one prompt ten times.

    Args:
        estimate: the estimate after the answers so far.
        differences_QD: `phi(a) - phi(b)` of each question.
        asked: the indices of the questions that were asked, including skipped ones.
        prompts: the prompt of each question. By default, every question has its own prompt.
        rule: see `question_scores`. Equal scores go to the first question of the pool.
        rng: the generator of random numbers. The default is seeded with the number of questions asked.
        targets_TD: the questions whose answers are to be predicted, for the rule `prediction`. See `question_scores`.
    """
    differences = np.asarray(differences_QD, dtype=np.float64)
    rng = np.random.default_rng(len(asked)) if rng is None else rng
    is_open = np.ones(len(differences), dtype=bool)
    is_open[list(asked)] = False
    if not is_open.any():
        return None
    if prompts is not None:
        uses = {prompt: 0 for prompt in prompts}
        for index in asked:
            uses[prompts[index]] += 1
        num_uses = np.array([uses[prompt] for prompt in prompts])
        is_open &= num_uses == num_uses[is_open].min()
    scores = question_scores(estimate, differences, rule, rng, targets_TD=targets_TD)
    return int(np.argmax(np.where(is_open, scores, -np.inf)))
