"""Run the study: learn from some people, predict other people, for several splits of the people.

Each split is stored when it is done. An interrupted run skips the stored splits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from blake3 import blake3

from personalized_soups.errors import UsageError
from personalized_soups.studies.folder import StudyFolder, write_text
from personalized_soups.studies.papi.basis import RatingBasis, learn_basis
from personalized_soups.studies.papi.interviews import (
    Answering,
    Interviewer,
    choose_answering,
    ordered_share,
    unseen_pairs,
)
from personalized_soups.studies.papi.ratings import PEOPLE, SPLIT, STATEMENTS, Floats, Ratings, read_ratings
from personalized_soups.studies.study import Bar, Stage
from personalized_soups.users.answers.selection import Rule

RULES: tuple[Rule, ...] = ("prediction", "information", "variance", "random")


class SplitResults(TypedDict):
    """The shares of one split, as means over its new people.

    Attributes:
        seed: the seed of the split.
        num_people: the number of new people.
        answering: the candidate that was chosen for the split, by its fields.
        shares: for each rule, the share after 0, 1, 2, ... answers.
        common: the share of the mean order of the known people.
        all_ratings: the share with the weights from all ratings of known statements.
    """

    seed: int
    num_people: int
    answering: dict[str, float]
    shares: dict[str, list[float]]
    common: float
    all_ratings: float


@dataclass(frozen=True, slots=True)
class PapiStudy:
    """The settings of the study.

    Attributes:
        num_known: the number of people from whom the basis is learned. All others are new.
        num_rewards: the number of learned base rewards.
        num_questions: the number of questions to each new person.
        num_seeds: the number of splits.
    """

    num_known: int = 130
    num_rewards: int = 5
    num_questions: int = 20
    num_seeds: int = 5


def run_papi(
    study: PapiStudy, data_folder: Path, out: Path, *, stage: Stage, overwrite: bool = False
) -> list[SplitResults]:
    """Run every split that is not stored in `out`, and return the results of all splits.

    Raises:
        UsageError: if a file of the data is missing, or there are too few people.
        FileFormatError: if a file of the data has other content.
        OutputExistsError: if `out` holds other files, or a study with other settings.
    """
    data = read_ratings(data_folder)
    if not 3 * 30 + 2 <= study.num_known < len(data.ratings):
        raise UsageError(
            f"{study.num_known} known people, but the data has {len(data.ratings)} people",
            where="num_known",
            mend=f"give a number from 92 to {len(data.ratings) - 1}",
        )
    folder = StudyFolder(out)
    if overwrite and folder.settings.is_file():
        folder.clear()
        shutil.rmtree(out / "splits", ignore_errors=True)
    folder.begin({"study": "papi", **asdict(study), "num_seeds": None, "data": _digest(data_folder)})
    results: list[SplitResults] = []
    with stage("asking real people", study.num_seeds * (len(data.ratings) - study.num_known)) as bar:
        for seed in range(study.num_seeds):
            path = out / "splits" / f"{seed}.json"
            if not path.is_file():
                split = run_split(study, data, seed, bar=bar)
                write_text(path, json.dumps(split, indent=2, allow_nan=False) + "\n")
            results.append(json.loads(path.read_text(encoding="utf-8")))
            bar.update((seed + 1) * (len(data.ratings) - study.num_known))
    return results


def run_split(
    study: PapiStudy, data: Ratings, seed: int, *, rules: Sequence[Rule] = RULES, bar: Bar | None = None
) -> SplitResults:
    """Return the results of one split with some of the rules."""
    order = np.random.default_rng(seed).permutation(len(data.ratings))
    known, new = order[: study.num_known], order[study.num_known :]
    answering = choose_answering(data, known, num_rewards=study.num_rewards, seed=seed)
    basis = learn_basis(data.ratings[known], study.num_rewards)
    interviewer = Interviewer(basis, data, answering, seed)
    pairs = unseen_pairs(data)
    shares = {rule: np.zeros(study.num_questions + 1) for rule in rules}
    common = all_ratings = 0.0
    for done, person in enumerate(new):
        ratings = data.ratings[person]
        for rule in rules:
            weights = interviewer.weights(ratings, rule, study.num_questions, person=int(person))
            shares[rule] += ordered_share(weights @ basis.matrix.T, ratings, pairs) / len(new)
        ceiling = _from_all_ratings(basis, data, ratings)
        scores = np.stack([basis.matrix[:, -1], basis.matrix @ ceiling])
        of_common, of_all = ordered_share(scores, ratings, pairs)
        common, all_ratings = common + of_common / len(new), all_ratings + of_all / len(new)
        if bar is not None:
            bar.update(seed * len(new) + done + 1)
    return {
        "seed": seed,
        "num_people": len(new),
        "answering": asdict(answering),
        "shares": {rule: [float(share) for share in shares[rule]] for rule in rules},
        "common": float(common),
        "all_ratings": float(all_ratings),
    }


def _from_all_ratings(basis: RatingBasis, data: Ratings, ratings_M: Floats) -> Floats:
    seen = np.full_like(ratings_M, np.nan)
    seen[data.known] = ratings_M[data.known]
    return basis.weights(seen)


def _digest(folder: Path) -> Mapping[str, str]:
    return {name: blake3((folder / name).read_bytes()).hexdigest(length=16) for name in (PEOPLE, STATEMENTS, SPLIT)}


__all__ = ["RULES", "Answering", "PapiStudy", "SplitResults", "run_papi", "run_split"]
