"""Make a pool of questions that a user has answered, with the rewards of other experts than those of the first pool.

Shapes: Q = questions, D = base rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from personalized_soups.declare.evidence import AnsweredQuestion
from personalized_soups.errors import UsageError
from personalized_soups.scoring.base_rewards import BaseRewards, TextItem
from personalized_soups.scoring.bounded_rewards import BoundedRewards, typical_bounds
from personalized_soups.users.answers.pairing import scaled_ridge
from personalized_soups.users.answers.pool import PoolRecord, QuestionPool


def pool_of_answers(answers: Sequence[AnsweredQuestion], rewards: BaseRewards[TextItem]) -> QuestionPool:
    """Return a pool of the questions of some answers. An `InferenceSession` with it has no further questions.

    The rewards are bounded by `typical_bounds` of these answers, and the prior of the weights is `scaled_ridge` of the
    questions.

    Args:
        answers: the answers of one user. Their questions are stored with them, so no other pool is needed.
        rewards: the base rewards, such as the implicit rewards of the current experts.

    Raises:
        UsageError: if there is no answer, or the rewards of the two answers are equal in every question.
        SoupError: if a reward cannot be computed.
    """
    questions = tuple(answered.question for answered in answers)
    items = [TextItem(question.prompt, text) for question in questions for text in (question.a, question.b)]
    unbounded = rewards.features(items)
    if np.array_equal(unbounded[0::2], unbounded[1::2]):
        what = "there are no answers" if not questions else "the rewards of the two answers are equal in every question"
        raise UsageError(
            f"{what}, so no weights can be estimated", where="answers", mend="answer questions, or give other experts"
        )
    centres, scales = typical_bounds(unbounded)
    bounded_rewards = BoundedRewards(rewards, centres=centres, scales=scales)
    features = bounded_rewards.bounded(unbounded).astype(np.float32)
    a_QD, b_QD = features[0::2], features[1::2]
    prior = scaled_ridge(a_QD.astype(np.float64) - b_QD)
    record = PoolRecord(
        names=rewards.names,
        digest=bounded_rewards.digest,
        centres=tuple(centres.tolist()),
        scales=tuple(scales.tolist()),
        options={"kind": "answered questions"},
        prior={"kind": "ridge", "penalty": float(1 / prior.covariance[0, 0])},
    )
    return QuestionPool(record, questions, a_QD, b_QD, prior)
