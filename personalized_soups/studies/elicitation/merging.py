"""Generate with the soups of simulated users, many users in one batch, and score the answers by the users' rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.persona import Persona
from personalized_soups.declare.profile import Profile
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.studies.elicitation.world import MAX_NEW_TOKENS, Floats
from personalized_soups.studies.folder import AnswerFile
from personalized_soups.tiny.simulated_users import PersonaRewards
from personalized_soups.users.answers.profile import SCALE

if TYPE_CHECKING:
    from personalized_soups.mixing.model import SoupModel

TEMPERATURE = 0.7
_BATCH_ROWS = 128


@dataclass(frozen=True, slots=True)
class SoupJob:
    """The prompts that one user's soup answers.

    Attributes:
        name: the name of the job, unique in the study of a seed.
        profile: the soup; None for the base alone.
        prompts: the places of the prompts in the list of held-out prompts.
    """

    name: str
    profile: Profile | None
    prompts: tuple[int, ...]


def declared_profile(persona: Persona, catalogue: Catalogue, *, num_answers: int = 0, scale: float = SCALE) -> Profile:
    """Return the soup of the declared weights: the preferred side of each dimension, in proportion to its weight.

    The greatest weight is `scale`.
    """
    weights = persona.by_dimension(catalogue, num_answers=num_answers)
    greatest = max(map(abs, weights.values()))
    sides = {}
    for dimension, weight in weights.items():
        end = "high" if weight > 0 else "low"
        side = next(name for name, each in catalogue.dimensions[dimension].sides.items() if each.end == end)
        sides[side] = round(scale * abs(weight) / greatest, 4)
    return Profile(user=persona.name, weights={side: weight for side, weight in sides.items() if weight > 0})


def uniform_profile(experts: Sequence[str]) -> Profile:
    """Return the soup in which all experts have the same weight, with the sum 1."""
    return Profile(user="uniform", weights=dict.fromkeys(experts, 1 / len(experts)), allow_opposed=True)


def answer_jobs(
    model: SoupModel,
    jobs: Sequence[SoupJob],
    prompts: Sequence[str],
    stored: AnswerFile,
    *,
    seed: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_rows: int = _BATCH_ROWS,
    on_done: Callable[[int], None] = lambda _: None,
) -> dict[str, list[str]]:
    """Return the answers of each job, by name. Stored answers are read, and the others are generated and stored.

    Rows of a batch have the soups of different users. Answers to the same prompt have the same random numbers, so
    differences between soups are not hidden by the sampling.
    """
    answers = stored.read()
    at_once = max(1, batch_rows // max((len(job.prompts) for job in jobs), default=1))
    for start in range(0, len(jobs), at_once):
        # Rounding depends on the batch, so a resumed run has the same batches as a run without interruption.
        batch = jobs[start : start + at_once]
        if all(job.name in answers for job in batch):
            continue
        places = [place for job in batch for place in job.prompts]
        texts = model.generate(
            [prompts[place] for place in places],
            [job.profile for job in batch for _ in job.prompts],
            temperature=TEMPERATURE,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_rows,
            places=places,
        )
        for job in batch:
            own, texts = texts[: len(job.prompts)], texts[len(job.prompts) :]
            if job.name not in answers:
                answers[job.name] = own
                stored.add(job.name, own)
        on_done(start + len(batch))
    return answers


def mean_rewards(
    rewards: PersonaRewards,
    personas: Sequence[Persona],
    prompts: Sequence[str],
    users_prompts: Sequence[Sequence[int]],
    answers: Mapping[int, Sequence[str]],
) -> Floats:
    """Return [U]: the mean reward of each user's answers.

    Args:
        rewards: the rewards of answers.
        personas: the users.
        prompts: the held-out prompts.
        users_prompts: the places of each user's prompts.
        answers: the answers of each user, by the user's number.
    """
    means = []
    for user, persona in enumerate(personas):
        pairs = zip(users_prompts[user], answers[user], strict=True)
        items = [TextItem(prompts[place], answer) for place, answer in pairs]
        means.append(rewards.of(persona, items).mean())
    return np.array(means)
