"""Pools of questions whose base rewards are drawn at random: no model is needed to ask them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.declare.evidence import Question
from personalized_soups.scoring.expert_digests import expert_digest
from personalized_soups.users.answers.pool import PooledExpert, PoolRecord, QuestionPool
from personalized_soups.users.answers.prior import GaussianPrior

DIMENSIONS = {"concise": "length", "friendly": "style", "long": "length", "unfriendly": "style"}


def pool_of(num: int, *, seed: int = 0, experts: Path | None = None, base: Path | None = None) -> QuestionPool:
    """Return a pool of `num` questions, each with its own prompt, for four experts.

    Args:
        num: the number of questions.
        seed: the seed of the rewards. The texts of pools with other seeds differ.
        experts: the folder of the experts that the pool records.
        base: the folder of the base that the pool records.
    """
    questions = tuple(
        Question(id=f"q{index}", prompt=f"Prompt {index}?", a=f"First {seed}.{index}.", b=f"Second {seed}.{index}.")
        for index in range(num)
    )
    a_QD, b_QD = np.random.default_rng(seed).normal(size=(2, num, len(DIMENSIONS))).astype(np.float32)
    record = PoolRecord(
        names=tuple(DIMENSIONS),
        digest="0",
        experts=tuple(
            PooledExpert(
                name=name,
                digest="0" if experts is None else expert_digest(experts / name),
                side=name,
                dimension=dimension,
            )
            for name, dimension in DIMENSIONS.items()
        ),
        base=None if base is None else str(base),
        base_fingerprint=None if base is None else base_fingerprint(base),
        options={"max_new_tokens": 16},
    )
    return QuestionPool(record, questions, a_QD, b_QD, GaussianPrior.ridge(len(DIMENSIONS)))
