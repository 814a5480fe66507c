"""`World`: the questions and the held-out answers of one seed, with the rewards of simulated users.

Shapes: Q = questions, M = held-out answers, H = held-out pairs, D = base rewards, F = hidden features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.bounded_rewards import bounded
from personalized_soups.scoring.hidden_states import HiddenStates
from personalized_soups.scoring.implicit_rewards import ImplicitRewards
from personalized_soups.studies.folder import write_text
from personalized_soups.tiny.corpus import prompts
from personalized_soups.tiny.simulated_users import PersonaRewards
from personalized_soups.users.answers.candidates import sample_candidates
from personalized_soups.users.answers.making import make_questions
from personalized_soups.users.answers.pairing import pairs_within
from personalized_soups.users.answers.pool import QuestionPool

if TYPE_CHECKING:
    from personalized_soups.mixing.model import SoupModel

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

ANSWERS_PER_PROMPT = 4
MAX_NEW_TOKENS = 128  # nearly all answers of the tiny base are shorter


@dataclass(frozen=True)
class World:
    """The material of one seed.

    Attributes:
        pool: the questions, with the experts' bounded implicit rewards.
        items: held-out answers, several to each prompt.
        implicit: [M, D], the same rewards of the held-out answers.
        hidden: [2 Q + M, F], the base's hidden states of the answers `a`, the answers `b` and the held-out answers.
        rewards: the simulated users' rewards.
    """

    pool: QuestionPool
    items: tuple[TextItem, ...]
    implicit: Floats
    hidden: Floats
    rewards: PersonaRewards

    @cached_property
    def pairs(self) -> Indices:
        """[H, 2]: all pairs of held-out answers to the same prompt."""
        return pairs_within([item.prompt for item in self.items])

    @cached_property
    def question_items(self) -> list[TextItem]:
        """The answers `a` of all questions, then the answers `b`."""
        questions = self.pool.questions
        return [TextItem(q.prompt, q.a) for q in questions] + [TextItem(q.prompt, q.b) for q in questions]

    @cached_property
    def question_scores(self) -> Floats:
        """[Q, K]: the scores of `a` minus the scores of `b`, which a persona's weights multiply."""
        scores = self.rewards.features(self.question_items)
        result: Floats = scores[: len(self.pool)] - scores[len(self.pool) :]
        return result

    @cached_property
    def held_scores(self) -> Floats:
        """[M, K]: the scores of the held-out answers."""
        return self.rewards.features(self.items)


def make_world(
    model: SoupModel, rewards: PersonaRewards, folder: Path, *, seed: int, num_prompts: int, num_questions: int
) -> World:
    """Return the world of a seed. Its files in `folder` are written once.

    Args:
        model: the base with the experts.
        rewards: the simulated users' rewards.
        folder: the folder of the seed.
        seed: the seed.
        num_prompts: the number of prompts of the questions. Half as many are held out.
        num_questions: the number of questions.
    """
    if not (folder / "questions").is_dir():
        make_questions(
            model,
            prompts("validation", num_prompts, seed),
            num_questions=num_questions,
            answers_per_prompt=ANSWERS_PER_PROMPT,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed,
        ).write(folder / "questions")
    pool = QuestionPool.open(folder / "questions")
    path = folder / "held-out.json"
    if not path.is_file():
        items = sample_candidates(
            model,
            prompts("held-out", num_prompts // 2, seed),
            answers_per_prompt=ANSWERS_PER_PROMPT,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed + 1_000_000,  # not the random numbers of the questions
        )
        implicit = ImplicitRewards(model).features(items)
        document = {"items": items, "rewards": implicit.tolist()}
        write_text(path, json.dumps(document, ensure_ascii=False) + "\n")
    document = json.loads(path.read_text(encoding="utf-8"))
    items = [TextItem(*item) for item in document["items"]]
    implicit = np.array(document["rewards"])
    if pool.record.centres:
        implicit = bounded(implicit, pool.record.centres, pool.record.scales)
    questions = [TextItem(q.prompt, q.a) for q in pool.questions] + [TextItem(q.prompt, q.b) for q in pool.questions]
    states = HiddenStates(model.model, model.generator.tokenizer, pooling="mean")
    with model.mixture(None):
        hidden = states.features([*questions, *items])
    return World(pool, tuple(items), implicit, hidden, rewards)
