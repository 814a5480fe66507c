"""A pool of questions for the three experts of the served tests, with rewards drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from personalized_soups.declare.evidence import Question
from personalized_soups.scoring.expert_digests import expert_digest
from personalized_soups.users.answers.pool import PooledExpert, PoolRecord, QuestionPool
from personalized_soups.users.answers.prior import GaussianPrior

DIMENSIONS = {"cold": "temper", "plain": None, "warm": "temper"}


def pool_of(
    experts: Path, num: int = 40, *, seed: int = 0, dimensions: Mapping[str, str | None] = DIMENSIONS
) -> QuestionPool:
    """Return `num` questions about the experts in a folder. Each has its own prompt."""
    record = PoolRecord(
        names=tuple(dimensions),
        digest="0",
        experts=tuple(
            PooledExpert(name=name, digest=expert_digest(experts / name), side=name, dimension=dimension)
            for name, dimension in dimensions.items()
        ),
        folders=(str(experts),),
    )
    questions = tuple(
        Question(id=f"q{seed}-{index}", prompt=f"Prompt {index}?", a=f"First {index}.", b=f"Second {index}.")
        for index in range(num)
    )
    a_QD, b_QD = np.random.default_rng(seed).normal(size=(2, num, len(dimensions))).astype(np.float32)
    return QuestionPool(record, questions, a_QD, b_QD, GaussianPrior.ridge(len(dimensions)))
