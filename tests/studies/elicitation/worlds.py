"""A world without a model: answers of the corpus, whose base rewards are their scores with noise."""

from __future__ import annotations

import random

import numpy as np

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.evidence import Question
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.studies.elicitation.world import World
from personalized_soups.tiny.corpus import document, topics
from personalized_soups.tiny.simulated_users import PersonaRewards
from personalized_soups.users.answers.pairing import scaled_ridge
from personalized_soups.users.answers.pool import PooledExpert, PoolRecord, QuestionPool

EXPERTS = ("concise", "elementary", "expert", "friendly", "informative", "unfriendly")
SIDES = {
    "concise": ("informativeness", -1.0),
    "elementary": ("expertise", -1.0),
    "expert": ("expertise", 1.0),
    "friendly": ("style", 1.0),
    "informative": ("informativeness", 1.0),
    "unfriendly": ("style", -1.0),
}
CATALOGUE = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)


def make_world(*, noise: float = 0.1, num_prompts: int = 28, seed: int = 0) -> World:
    """Return a world with 4 answers to each prompt: questions on half of the prompts, and the rest held out."""
    rng = np.random.default_rng(seed)
    rewards = PersonaRewards(CATALOGUE)
    items = []
    for topic in topics("validation")[:num_prompts]:
        answers: dict[str, None] = {}
        generator = random.Random(f"{seed}/{topic}")
        while len(answers) < 4:
            answers.setdefault(document(topic, generator).answer)
        prompt = f"How do I {topic.action} the {topic.object}?"
        items += [TextItem(prompt, answer) for answer in answers]
    scores = rewards.features(items)
    columns = [list(rewards.dimensions).index(SIDES[name][0]) for name in EXPERTS]
    signs = np.array([SIDES[name][1] for name in EXPERTS])
    implicit = scores[:, columns] * signs + noise * rng.normal(size=(len(items), len(EXPERTS)))
    hidden = scores @ rng.normal(size=(4, 8)) + noise * rng.normal(size=(len(items), 8))
    half = len(items) // 2
    pairs = [(first, first + step) for first in range(0, half, 4) for step in (1, 2, 3)]
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    questions = tuple(
        Question(id=f"q{at}", prompt=items[first].prompt, a=items[first].answer, b=items[second].answer)
        for at, (first, second) in enumerate(pairs)
    )
    record = PoolRecord(
        names=EXPERTS,
        digest="0" * 8,
        experts=tuple(
            PooledExpert(name=name, digest="0", side=name, dimension=SIDES[name][0], beta=1.0) for name in EXPERTS
        ),
    )
    features = implicit.astype(np.float32)
    pool = QuestionPool(record, questions, features[a], features[b], scaled_ridge(implicit[a] - implicit[b]))
    held = slice(half, None)
    return World(
        pool, tuple(items[held]), implicit[held], np.concatenate([hidden[a], hidden[b], hidden[held]]), rewards
    )
