"""Choose pairs of answers that tell users apart, before any user is known.

Shapes: N = answers, P = candidate pairs, Q = chosen pairs, D = base rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.prior import Floats, GaussianPrior

# A pair is left out if a typical margin of it is less than this share of the typical margin of all pairs. Users would
# answer it almost at random.
_MIN_SHARE = 0.1

# The root mean square of the margins of questions under the prior. Users are surer of their taste than a prior with
# margins around 1 assumes: that prior holds the weights back, and asks about directions that are known already. On
# validation topics of the tiny base, margins from 4 to 5 predict the most answers of users without noise.
TYPICAL_MARGIN = 4.0


def scaled_ridge(differences_PD: npt.ArrayLike, *, typical_margin: float = TYPICAL_MARGIN) -> GaussianPrior:
    """Return the prior N(0, 1 / penalty) with which the pairs' margins have the root mean square `typical_margin`.

    A margin is `w . v` for weights w and a difference v. Under N(0, 1 / penalty), its mean square is `|v|^2 / penalty`,
    so `penalty = mean |v|^2 / typical_margin^2`. The prior then does not depend on the scale of the rewards.

    Args:
        differences_PD: the differences `phi(a) - phi(b)` of the pairs. At least one must not be 0.
        typical_margin: greater than 0. With a margin of 4, a user chooses the better answer in 98% of the cases.
    """
    differences = np.asarray(differences_PD, dtype=np.float64)
    penalty = float(np.mean(np.sum(differences**2, axis=1))) / typical_margin**2
    return GaussianPrior.ridge(differences.shape[1], penalty=penalty)


def pairs_within(prompts: Sequence[str]) -> npt.NDArray[np.intp]:
    """Return [P, 2]: the indices of every two answers to the same prompt. The first index is the smaller one.

    Args:
        prompts: the prompt of each of the N answers.
    """
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(index)
    pairs = [
        (first, second) for group in members.values() for at, first in enumerate(group) for second in group[at + 1 :]
    ]
    return np.array(pairs, dtype=np.intp).reshape(-1, 2)


def informative_pairs(
    differences_PD: npt.ArrayLike, prompts: Sequence[str], count: int, prior: GaussianPrior
) -> list[int]:
    """Return the indices of at most `count` pairs, the most informative pair first.

    Pairs are chosen one by one. Each pair maximises the growth of the log determinant of the precision (Bayesian
    D-optimal design), `log(1 + g v'Cv)`, where C is the covariance after the pairs before. The users are not known yet,
    so g is the mean of `sigmoid'(w . v)` over the prior. Pairs with large differences do not win always, because users
    agree on them and g is small. A prompt is used again only after every prompt was used equally often.

    Pairs that a typical user could hardly tell apart are left out: those with a standard deviation of the margin, over
    the prior, of less than a tenth of the root mean square.

    Args:
        differences_PD: the differences `phi(a) - phi(b)`.
        prompts: the prompt of each pair.
        count: the number of pairs to choose.
        prior: the prior of the weights.
    """
    differences = np.asarray(differences_PD, dtype=np.float64)
    variances = np.einsum("pd,de,pe->p", differences, prior.covariance, differences)
    is_open = variances >= _MIN_SHARE**2 * variances.mean() if len(variances) else np.zeros(0, dtype=bool)
    is_open &= variances > 0
    information = _mean_slopes(differences @ prior.mean, variances)
    names = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_P = np.array([names[prompt] for prompt in prompts], dtype=np.intp)
    uses = np.zeros(len(names), dtype=np.intp)
    covariance = prior.covariance.copy()
    chosen: list[int] = []
    while len(chosen) < count and is_open.any():
        uses_P = uses[prompt_P]
        fresh = is_open & (uses_P == uses_P[is_open].min())
        # log(1 + x) grows with x, so the logarithm need not be computed
        gains = information * np.einsum("pd,de,pe->p", differences, covariance, differences)
        best = int(np.argmax(np.where(fresh, gains, -np.inf)))
        chosen.append(best)
        is_open[best] = False
        uses[prompt_P[best]] += 1
        # Sherman and Morrison: the inverse of C^-1 + g v v'
        column = covariance @ differences[best]
        covariance -= information[best] * np.outer(column, column) / (1 + gains[best])
    return chosen


def balanced_signs(differences_QD: npt.ArrayLike, covariance_DD: npt.ArrayLike, seed: int) -> npt.NDArray[np.bool_]:
    """Return [Q]: which pairs to turn around, so that the better answers of any user are about as often `a` as `b`.

    In an order that the seed shuffles, each pair gets the direction that keeps the sum S of the unit differences short
    (herding). With `|S + u|^2 <= |S|^2 + 1` at each step, `|S|^2` is at most Q, while independent coins reach Q on
    average. Lengths are measured in the metric of the prior, in which the directions of all users count equally.

    Args:
        differences_QD: the differences `phi(a) - phi(b)`.
        covariance_DD: the covariance of the prior.
        seed: shuffles the order, and chooses the direction of the first pair.
    """
    differences = np.asarray(differences_QD, dtype=np.float64)
    root = np.linalg.cholesky(np.asarray(covariance_DD, dtype=np.float64))
    units = differences @ root
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    rng = np.random.default_rng([seed, len(units)])
    total = np.zeros(units.shape[1])
    turned = np.zeros(len(units), dtype=bool)
    for index in rng.permutation(len(units)):
        product = float(total @ units[index])
        turned[index] = product > 0 if product else rng.random() < 0.5
        total += -units[index] if turned[index] else units[index]
    return turned


def _mean_slopes(means_P: Floats, variances_P: Floats) -> Floats:
    """Return the mean of `sigmoid'(m)` for normal margins m.

    With MacKay's approximation, the mean of `sigmoid(m)` is `sigmoid(k mean)` for `k = 1 / sqrt(1 + pi variance / 8)`.
    Its derivative by the mean is `k sigmoid'(k mean)`.
    """
    scale = 1 / np.sqrt(1 + np.pi * variances_P / 8)
    half = np.exp(-np.abs(scale * means_P))
    result: Floats = scale * half / (1 + half) ** 2
    return result
