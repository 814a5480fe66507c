"""A pool of questions whose base rewards are drawn at random: no model is needed to ask them."""

from __future__ import annotations

import numpy as np

from personalized_soups.declare.evidence import Question
from personalized_soups.users.answers.pool import PoolRecord, QuestionPool
from personalized_soups.users.answers.prior import GaussianPrior

NAMES = ("concise", "friendly", "long", "unfriendly")


def pool_of(num: int, *, seed: int = 0) -> QuestionPool:
    """Return a pool of `num` questions, each with its own prompt, for four experts."""
    questions = tuple(
        Question(id=f"q{index}", prompt=f"Prompt {index}?", a=f"First {index}.", b=f"Second {index}.")
        for index in range(num)
    )
    a_QD, b_QD = np.random.default_rng(seed).normal(size=(2, num, len(NAMES))).astype(np.float32)
    return QuestionPool(PoolRecord(names=NAMES, digest="0"), questions, a_QD, b_QD, GaussianPrior.ridge(len(NAMES)))
