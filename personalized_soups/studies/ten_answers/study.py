"""Run the study: simulated users answer ten questions, and their soups answer prompts that they have not seen.

The experts are those of a finished quickstart. A user's true reward is a weighted sum of the catalogue's scores. The
questions are answers of the base and its experts to validation prompts, and each user is asked the questions that tell
most, by the experts' implicit rewards. The soups answer test prompts.

Shapes: U = users, Q = questions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import TypedDict

import numpy as np

from personalized_soups.declare.persona import Persona
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import InputError, UsageError
from personalized_soups.evaluation.results import Results
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.expert_digests import expert_digest
from personalized_soups.studies.choosing import choice_in
from personalized_soups.studies.costs import Costs
from personalized_soups.studies.elicitation.merging import SoupJob, answer_jobs, declared_profile, mean_rewards
from personalized_soups.studies.elicitation.systems import COUNTS, ask
from personalized_soups.studies.folder import StudyFolder, write_text
from personalized_soups.studies.study import Stage, Study
from personalized_soups.tiny.simulated_users import PersonaRewards, SimulatedUser, draw_personas
from personalized_soups.users.answers.making import make_questions
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.answers.profile import profile_of

BASE, INFERRED, DECLARED = "base", "ten answers", "declared weights"

_ANSWERS_PER_PROMPT = 4
_POOL_TEMPERATURE = 0.7  # at 1, answers of a small model are broken more often


class TenAnswersResults(TypedDict):
    """The results of the study.

    Attributes:
        num_answers: the number of answers of each user.
        num_questions: the number of questions of the pool.
        num_prompts: the number of prompts that each user's soup answers.
        scale: the greatest weight of a profile: the weight of `linear` that the quickstart chose.
        rewards: for the base, the inferred and the declared weights, the mean true reward of each user's answers.
        gain: the inferred weights' mean gain over the base as a share of the declared weights' mean gain. None if the
            declared weights gain nothing.
        gain_interval: its 95% interval, from a bootstrap over users.
        sides: the share of dimensions, weighted by the true weights, whose preferred side was found.
        seconds: the seconds of each stage.
        memory: the memory of each stage, in bytes.
    """

    num_answers: int
    num_questions: int
    num_prompts: int
    scale: float
    rewards: dict[str, list[float]]
    gain: float | None
    gain_interval: list[float] | None
    sides: float
    seconds: dict[str, float]
    memory: dict[str, int]


@dataclass(frozen=True, slots=True)
class TenAnswersStudy:
    """The settings of the study.

    Attributes:
        study: the settings of the quickstart.
        quickstart: the folder of the finished quickstart.
        num_users: the number of simulated users.
        num_answers: the number of questions to each user: 2, 5, 10, 20 or 40.
        pool_prompts: the number of validation prompts of the questions.
        num_questions: the number of questions of the pool.
        num_prompts: the number of test prompts that each user's soup answers.
    """

    study: Study
    quickstart: Path
    num_users: int = 20
    num_answers: int = 10
    pool_prompts: int = 24
    num_questions: int = 72
    num_prompts: int = 4

    def __post_init__(self) -> None:
        if self.num_answers not in COUNTS:
            raise UsageError(
                f"num_answers is {self.num_answers}, but must be one of {', '.join(map(str, COUNTS))}",
                where="num_answers",
                mend="give num_answers=10",
            )

    @property
    def scale(self) -> float:
        """The weight of `linear` that the quickstart chose on validation prompts.

        Raises:
            UsageError: if the quickstart is not finished.
        """
        path = StudyFolder(self.quickstart).results
        if not path.is_file():
            raise UsageError(
                "the folder holds no finished quickstart",
                where=str(self.quickstart),
                mend="give the folder of a finished psoups quickstart, or finish this one first",
            )
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        return float(choice_in(results).weights["linear"])

    def check(self) -> None:
        """Check that the quickstart had the settings of `study`.

        Raises:
            UsageError: if its settings differ, it did not choose a weight of `linear`, or there is no quickstart.
        """
        if "linear" not in self.study.recipe.selection.weights:
            raise UsageError(
                "the study chooses no weight of the method linear, which is the scale of the profiles",
                where="study",
                mend="give a recipe with weights of linear",
            )
        path = StudyFolder(self.quickstart).settings
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if stored != json.loads(json.dumps(self.study.settings())):
            raise UsageError(
                "the folder holds no quickstart with these settings",
                where=str(self.quickstart),
                mend="give the base, the recipes and the seed of the quickstart, and run it with this version",
            )

    def settings(self) -> dict[str, object]:
        """Return the settings that a resumed run must have in common with the interrupted run."""
        folder = StudyFolder(self.quickstart).experts
        return {
            "study": "ten answers",
            "quickstart": self.study.settings(),
            "experts": {side: expert_digest(folder / side) for side in self.study.catalogue.sides},
            "scale": self.scale,
            **{
                name: getattr(self, name)
                for name in ("num_users", "num_answers", "pool_prompts", "num_questions", "num_prompts")
            },
        }


def run_ten_answers(ten: TenAnswersStudy, out: Path, *, stage: Stage, overwrite: bool = False) -> TenAnswersResults:
    """Run the stages that are not stored in `out`, and return the results.

    Raises:
        UsageError: if the quickstart is not finished, or had other settings.
        OutputExistsError: if `out` holds other files, or a study with other settings.
        InputError: if the answers to the prompts give too few questions.
        SoupError: if a stage fails.
    """
    ten.check()
    folder = StudyFolder(out)
    if overwrite and folder.settings.is_file():
        folder.clear()
    folder.begin(ten.settings())
    costs = Costs(folder)
    model = SoupModel.from_pretrained(ten.study.base, StudyFolder(ten.quickstart).experts, device=ten.study.device)
    rewards = PersonaRewards(ten.study.catalogue)
    personas = draw_personas("exact", ten.num_users, rewards.dimensions, seed=ten.study.seed)
    with costs.stage("questions"):
        pool = _pool(ten, model, out / "questions", stage)
    with costs.stage("answers of users"), stage("asking simulated users", None):
        inferred = [
            _inferred(ten, pool, model, SimulatedUser(persona, rewards), place)
            for place, persona in enumerate(personas)
        ]
    with costs.stage("answers of soups"):
        means = _rewards(ten, model, folder, rewards=rewards, personas=personas, inferred=inferred, stage=stage)
    interval = gain_interval(means)
    return TenAnswersResults(
        num_answers=ten.num_answers,
        num_questions=len(pool),
        num_prompts=ten.num_prompts,
        scale=ten.scale,
        rewards=means,
        gain=None if interval is None else gain_share(means, range(len(personas))),
        gain_interval=None if interval is None else [*interval],
        sides=fsum(
            _share_of_sides(profile, persona, rewards) for profile, persona in zip(inferred, personas, strict=True)
        )
        / len(personas),
        seconds=costs.seconds,
        memory=costs.memory,
    )


def gain_share(rewards: dict[str, list[float]], users: Sequence[int]) -> float:
    """Return the inferred weights' mean gain over the base, divided by the declared weights' mean gain.

    Return NaN if the declared weights gain nothing.

    Args:
        rewards: the mean reward of each user, by system.
        users: the places of the users to count, who may repeat.
    """
    inferred, declared = (
        fsum(rewards[name][user] - rewards[BASE][user] for user in users) for name in (INFERRED, DECLARED)
    )
    return inferred / declared if declared > 0 else float("nan")


def gain_interval(rewards: dict[str, list[float]], *, num_resamples: int = 2000) -> tuple[float, float] | None:
    """Return the 95% interval of `gain_share` from a bootstrap over users, given the prompts.

    Resamples in which the declared weights gain nothing are left out.

    Return None if the declared weights gain nothing over all users.
    """
    if np.isnan(gain_share(rewards, range(len(rewards[BASE])))):
        return None
    count = len(rewards[BASE])
    rng = np.random.default_rng(0)
    shares = np.array([gain_share(rewards, rng.integers(0, count, size=count).tolist()) for _ in range(num_resamples)])
    low, high = np.nanquantile(shares, [0.025, 0.975])
    return float(low), float(high)


def _pool(ten: TenAnswersStudy, model: SoupModel, folder: Path, stage: Stage) -> QuestionPool:
    if not folder.is_dir():
        with stage("making questions", None) as bar:
            make_questions(
                model,
                ten.study.drawn("validation", ten.pool_prompts),
                num_questions=ten.num_questions,
                answers_per_prompt=_ANSWERS_PER_PROMPT,
                temperature=_POOL_TEMPERATURE,
                max_new_tokens=ten.study.recipe.max_new_tokens,
                whole_sentences=ten.study.recipe.pairs.whole_sentences,
                seed=ten.study.seed,
                base=ten.study.base,
                on_progress=lambda _, done, total: bar.update(done, total=total),
            ).write(folder)
    pool = QuestionPool.open(folder)
    if len(pool) < ten.num_answers:
        raise InputError(
            f"the answers to {ten.pool_prompts} prompts give only {len(pool)} questions, but each user answers "
            f"{ten.num_answers}",
            where=str(folder),
            mend="give more prompts or a greater max_new_tokens, or let the recipe's pairs have whole_sentences",
        )
    return pool


def _inferred(ten: TenAnswersStudy, pool: QuestionPool, model: SoupModel, user: SimulatedUser, place: int) -> Profile:
    """Ask one user, and return the profile that the answers give."""
    values = {"a": 1.0, "b": 0.0}

    def answer(index: int, count: int) -> float:
        return values.get(user.choice(pool.questions[index], num_answers=count), 0.5)

    _, _, estimates = ask(
        answer,
        pool.differences,
        pool.prior,
        pool.prompts,
        rule="prediction",
        rng=np.random.default_rng([ten.study.seed, place]),
        num_questions=ten.num_answers,
    )
    sides = SideRule.of(model.experts.values())
    return profile_of(
        estimates[ten.num_answers], pool.names, pool.differences, sides, user=user.persona.name, scale=ten.scale
    )


def _rewards(
    ten: TenAnswersStudy,
    model: SoupModel,
    folder: StudyFolder,
    *,
    rewards: PersonaRewards,
    personas: Sequence[Persona],
    inferred: Sequence[Profile],
    stage: Stage,
) -> dict[str, list[float]]:
    """Let the base and all soups answer test prompts, and return the mean true reward of each user's answers."""
    prompts = ten.study.test_prompts
    per_user = [
        tuple((user * ten.num_prompts + at) % len(prompts) for at in range(ten.num_prompts))
        for user in range(len(personas))
    ]
    catalogue = ten.study.catalogue
    profiles: dict[str, Sequence[Profile]] = {
        INFERRED: inferred,
        DECLARED: [declared_profile(persona, catalogue, scale=ten.scale) for persona in personas],
    }
    # A user's job of the base has the user's prompts, so all jobs of a batch have the same size.
    everyone: dict[str, Sequence[Profile | None]] = {BASE: [None] * len(personas), **profiles}
    jobs = [
        SoupJob(f"{name}/{user}", profile, per_user[user])
        for name, listed in everyone.items()
        for user, profile in enumerate(listed)
    ]
    with stage("answering with soups", len(jobs)) as bar:
        answers = answer_jobs(
            model,
            jobs,
            prompts,
            folder.answers("soups"),
            seed=3000 + ten.study.seed,
            max_new_tokens=ten.study.recipe.max_new_tokens,
            batch_rows=ten.study.recipe.batch_size or 128,
            on_done=bar.update,
        )
    of_users = {name: {user: answers[f"{name}/{user}"] for user in range(len(personas))} for name in everyone}
    return {name: mean_rewards(rewards, personas, prompts, per_user, mine).tolist() for name, mine in of_users.items()}


def _share_of_sides(profile: Profile, persona: Persona, rewards: PersonaRewards) -> float:
    """Return the share of the persona's weight that is on dimensions whose preferred side has a weight."""
    weights = persona.by_dimension(rewards.catalogue)
    wanted = declared_profile(persona, rewards.catalogue).weights
    chosen = profile.resolved_weights()
    found = [
        abs(weight)
        for dimension, weight in weights.items()
        if any(chosen.get(side, 0) > 0 for side in rewards.catalogue.dimensions[dimension].sides if side in wanted)
    ]
    return fsum(found) / fsum(map(abs, weights.values()))


def write_results(results: TenAnswersResults, out: Path) -> Path:
    """Write results.json, and return its path."""
    path = StudyFolder(out).results
    write_text(path, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return path
