"""Turn an estimate of reward weights into a profile: mixing weights of experts, from which a soup is made.

A user whose reward is `sum_e w_e r_e`, with the experts' implicit rewards `r_e`, is served best by a soup whose weights
are proportional to `w` (the maximum of the reward minus a KL penalty; see Rewarded Soups, arXiv:2306.04488, and the
closed form of DPO, arXiv:2305.18290). The answers of a user without noise do not fix the scale of `w`, so the scale of
the profile is a setting. It is chosen on validation prompts.

Shapes: D = base rewards, one for each expert. Q = questions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import UsageError
from personalized_soups.users.answers.estimate import Estimate
from personalized_soups.users.answers.preferences import experts_by_dimension, preferences_of

# The greatest weight of a profile, chosen on validation topics of the tiny base (docs/explanation/decisions.md).
SCALE = 0.6

# Weights below this share of the greatest weight are left out of the profile.
_SMALLEST = 0.02


def profile_of(
    estimate: Estimate,
    experts: Sequence[str],
    differences_QD: npt.ArrayLike,
    rule: SideRule,
    *,
    user: str = "anonymous",
    scale: float = SCALE,
    allow_opposed: bool = False,
) -> Profile:
    """Return the profile of a user.

    Only the preferred side of each dimension gets a weight. The weight of a dimension is proportional to

        (2 p - 1) sqrt(mean_q (sum_e w_e v_qe)^2)

    where the sum is over the experts of the dimension, `v_q` are the differences of the questions, and p is the
    probability that the preferred side is the right one. So the weight does not depend on the units of the rewards, and
    a dimension whose side is uncertain gets a small weight. The greatest weight is `scale`.

    Args:
        estimate: the estimate of the weights of the experts' rewards.
        experts: the names of the D experts.
        differences_QD: `phi(a) - phi(b)` of many questions, for example of a whole pool.
        rule: knows the dimension of each expert.
        user: the user of the profile.
        scale: the greatest weight of the profile, greater than 0.
        allow_opposed: give both sides of a dimension the weight that the estimate gives them, which may be negative.

    Raises:
        UsageError: if the estimate prefers no side at all, for example without any answer and with a prior around 0.

    Example:
        >>> rule = SideRule({"friendly": "style", "unfriendly": "style"})
        >>> differences = [[2.0, -2.0], [1.0, -2.0], [-1.0, 1.0]]
        >>> estimate = estimate_weights(differences, [1.0, 1.0, 0.0], GaussianPrior.ridge(2))
        >>> profile_of(estimate, ["friendly", "unfriendly"], differences, rule, user="ada").weights
        {'friendly': 0.6}
    """
    differences = np.asarray(differences_QD, dtype=np.float64)
    if allow_opposed:
        weights = {expert: float(weight) for expert, weight in zip(experts, estimate.mean, strict=True)}
    else:
        members = experts_by_dimension(experts, rule)
        weights = {}
        for preference in preferences_of(estimate, experts, rule):
            own = members[preference.dimension]
            spread = float(np.sqrt(np.mean((differences[:, own] @ estimate.mean[own]) ** 2)))
            weight = max(0.0, 2 * preference.probability - 1) * spread
            weights[preference.preferred] = weight
    greatest = max(map(abs, weights.values()), default=0.0)
    if greatest == 0:
        raise UsageError(
            "the answers show no preference, so there is nothing to merge",
            where=f"the answers of {user!r}",
            mend="answer more questions",
        )
    kept = {
        expert: round(scale * weight / greatest, 4)
        for expert, weight in weights.items()
        if abs(weight) >= _SMALLEST * greatest
    }
    return Profile(user=user, weights=kept, allow_opposed=allow_opposed)
