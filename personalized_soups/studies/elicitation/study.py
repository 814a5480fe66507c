"""Run the study: ask simulated users, predict their rewards with each system, and generate with their soups.

Every seed has its own experts, questions and users. Questions, held-out answers, generated answers and the results of a
seed are stored as soon as they are made. An interrupted run skips them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.persona import Persona
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import UsageError
from personalized_soups.mixing.model import SoupModel
from personalized_soups.studies.elicitation.calibration import Calibration, calibrate
from personalized_soups.studies.elicitation.merging import (
    SoupJob,
    answer_jobs,
    declared_profile,
    mean_rewards,
    uniform_profile,
)
from personalized_soups.studies.elicitation.rows import IMPLICIT, MERGED, SYSTEMS, Row, kind_rows, rows_of
from personalized_soups.studies.elicitation.systems import COUNTS, agreement
from personalized_soups.studies.elicitation.world import World, make_world
from personalized_soups.studies.folder import StudyFolder, write_text
from personalized_soups.studies.quickstart import train_study
from personalized_soups.studies.study import Stage, Study
from personalized_soups.tiny import BASE_FOLDER
from personalized_soups.tiny.corpus import prompts
from personalized_soups.tiny.simulated_users import PersonaRewards, draw_personas
from personalized_soups.users.answers.profile import profile_of


class SeedResults(TypedDict):
    """The results of one seed.

    Attributes:
        seed: the seed.
        agreement: for each row, the share of held-out pairs in the right order, by the number of answers and by user.
        kinds: the same for the other kinds of users, as means over users.
        rewards: for each row with a soup, the mean true reward of each user's answers, by the number of answers.
        calibration: how often intervals hold the truth.
        omitted: the rows that could not be run, with the reason.
    """

    seed: int
    agreement: dict[str, dict[str, list[float]]]
    kinds: dict[str, dict[str, float]]
    rewards: dict[str, dict[str, list[float]]]
    calibration: Calibration
    omitted: dict[str, str]


@dataclass(frozen=True, slots=True)
class ElicitationStudy:
    """The settings of the study.

    Attributes:
        num_seeds: the number of seeds.
        num_users: the number of simulated users of each kind.
        num_prompts: the number of held-out prompts that each user's soup answers.
        num_known: the number of known users, from whom priors and systems learn.
        per_known: the number of questions that each known user answers.
        pool_prompts: the number of prompts of the questions.
        num_questions: the number of questions of a pool.
        systems: the systems to run in addition to the experts' implicit rewards.
        device: `auto`, `cpu` or `cuda`.
        num_workers: the number of worker processes that train experts.
    """

    num_seeds: int = 3
    num_users: int = 50
    num_prompts: int = 4
    num_known: int = 100
    per_known: int = 30
    pool_prompts: int = 60
    num_questions: int = 150
    systems: tuple[str, ...] = tuple(SYSTEMS)
    device: str = "auto"
    num_workers: int = 2

    def settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the interrupted run."""
        return {
            "study": "elicitation",
            **{
                name: getattr(self, name)
                for name in ("num_users", "num_prompts", "num_known", "per_known", "pool_prompts", "num_questions")
            },
            "systems": list(self.systems),
        }


def run_elicitation(
    study: ElicitationStudy, out: Path, *, quickstarts: Sequence[Path] = (), stage: Stage, overwrite: bool = False
) -> list[SeedResults]:
    """Run every seed whose results are not stored in `out`, and return the results of all seeds.

    Args:
        study: the settings.
        out: the folder of the study.
        quickstarts: folders of `psoups quickstart`, whose experts the first seeds use. Experts of other seeds are
            trained.
        stage: opens a progress bar for each stage.
        overwrite: delete the files of a study in `out` and start again.

    Raises:
        UsageError: if a folder of `quickstarts` has no experts.
        OutputExistsError: if `out` holds other files, or a study with other settings.
    """
    for quickstart in quickstarts:
        if not (quickstart / "experts").is_dir():
            raise UsageError(
                "the folder has no experts",
                where=str(quickstart),
                mend="give the folder of a finished psoups quickstart",
            )
    folder = StudyFolder(out)
    if overwrite and folder.settings.is_file():
        folder.clear()
        for path in out.glob("seed-*"):
            shutil.rmtree(path, ignore_errors=True)
    folder.begin({**study.settings(), "quickstarts": [str(path) for path in quickstarts]})
    results: list[SeedResults] = []
    for seed in range(study.num_seeds):
        path = out / f"seed-{seed}" / "results.json"
        if not path.is_file():
            experts = quickstarts[seed] / "experts" if seed < len(quickstarts) else _trained(study, out, seed, stage)
            found = run_seed(study, experts, path.parent, seed=seed, stage=stage)
            write_text(path, json.dumps(found, indent=1, allow_nan=False) + "\n")
        results.append(json.loads(path.read_text(encoding="utf-8")))
    return results


def run_seed(study: ElicitationStudy, experts: Path, folder: Path, *, seed: int, stage: Stage) -> SeedResults:
    """Return the results of one seed. Its files are in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = SoupModel.from_pretrained(BASE_FOLDER, experts, device=study.device)
    rewards = PersonaRewards(load(shipped_recipe("dimensions/tiny.yaml"), Catalogue))
    with stage(f"seed {seed}: questions and held-out answers", None):
        world = make_world(
            model, rewards, folder, seed=seed, num_prompts=study.pool_prompts, num_questions=study.num_questions
        )
    personas = draw_personas("exact", study.num_users, rewards.dimensions, seed=seed)
    with stage(f"seed {seed}: asking simulated users", None) as bar:
        rows, omitted = rows_of(
            world,
            personas,
            num_known=study.num_known,
            per_known=study.per_known,
            seed=seed,
            systems=study.systems,
            on_done=bar.update,
        )
        kinds = kind_rows(
            world, num_users=study.num_users, num_known=study.num_known, per_known=study.per_known, seed=seed
        )
    sides = SideRule.of(model.experts.values())
    with stage(f"seed {seed}: checking intervals", None):
        calibration = calibrate(world.pool, sides, rule="prediction", num_users=2 * study.num_users, seed=seed)
    truths = [world.held_scores @ rewards.weights(persona) for persona in personas]
    shares = {
        name: {
            str(count): [agreement(world, row[user][count].held, truths[user]) for user in range(len(personas))]
            for count in COUNTS
            if count in row[0]
        }
        for name, row in rows.items()
    }
    return {
        "seed": seed,
        "agreement": shares,
        "kinds": kinds,
        "rewards": _soup_rewards(study, model, world, folder, personas=personas, rows=rows, seed=seed, stage=stage),
        "calibration": calibration,
        "omitted": omitted,
    }


def _soup_rewards(
    study: ElicitationStudy,
    model: SoupModel,
    world: World,
    folder: Path,
    *,
    personas: Sequence[Persona],
    rows: dict[str, Row],
    seed: int,
    stage: Stage,
) -> dict[str, dict[str, list[float]]]:
    held = prompts("held-out", study.pool_prompts // 2, seed)
    per_user = [
        tuple((user * study.num_prompts + at) % len(held) for at in range(study.num_prompts))
        for user in range(len(personas))
    ]
    catalogue = world.rewards.catalogue
    differences = world.pool.differences
    sides = SideRule.of(model.experts.values())

    def soup(name: str, user: int, count: int) -> Profile:
        estimate = rows[name][user][count].estimate
        return profile_of(estimate, world.pool.names, differences, sides, user=personas[user].name)

    # A soup of all users needs one answer to each prompt. Other soups are the users' own.
    everyone = tuple(range(len(held)))
    jobs = [SoupJob("base", None, everyone), SoupJob("uniform soup", uniform_profile(list(model.experts)), everyone)]
    makers: dict[tuple[str, int], Callable[[int], Profile]] = {
        ("declared weights", 0): lambda user: declared_profile(personas[user], catalogue)
    }
    for name, counts in MERGED.items():
        if name in rows:
            for count in counts:
                makers[name, count] = lambda user, name=name, count=count: soup(name, user, count)  # type: ignore[misc]
    own = {
        (name, count, user): SoupJob(f"{name}/{count}/{user}", maker(user), per_user[user])
        for (name, count), maker in makers.items()
        for user in range(len(personas))
    }
    jobs += own.values()
    with stage(f"seed {seed}: answering with soups", len(jobs)) as bar:
        stored = StudyFolder(folder).answers("soups")
        answers = answer_jobs(model, jobs, held, stored, seed=3000 + seed, on_done=bar.update)
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("base", "uniform soup"):
        mine = {user: [answers[name][place] for place in places] for user, places in enumerate(per_user)}
        found[name] = {"0": mean_rewards(world.rewards, personas, held, per_user, mine).tolist()}
    for name, count in makers:
        mine = {user: answers[own[name, count, user].name] for user in range(len(personas))}
        means = mean_rewards(world.rewards, personas, held, per_user, mine).tolist()
        found.setdefault(name, {})[str(count)] = means
    return found


def _trained(study: ElicitationStudy, out: Path, seed: int, stage: Stage) -> Path:
    folder = out / f"seed-{seed}" / "quickstart"
    return train_study(Study(seed=seed, num_workers=study.num_workers, device=study.device), folder, stage=stage)


__all__ = ["COUNTS", "IMPLICIT", "ElicitationStudy", "SeedResults", "run_elicitation", "run_seed"]
