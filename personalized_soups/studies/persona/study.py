"""Run the study: train experts of traits, measure them on all traits, choose weights, and measure soups.

Every expert and every measurement is stored when it is done. An interrupted run skips what is stored.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from personalized_soups.studies.costs import Costs
from personalized_soups.studies.folder import StudyFolder
from personalized_soups.studies.persona.seed_run import SeedRun
from personalized_soups.studies.persona.settings import PersonaStudy
from personalized_soups.studies.persona.statements import TraitSplit, read_statements, split_statements
from personalized_soups.studies.study import Stage


def run_persona(study: PersonaStudy, data: Path, out: Path, *, stage: Stage, overwrite: bool = False) -> list[SeedRun]:
    """Run every part of the study that is not stored in `out`, and return the runs of all seeds.

    Args:
        study: the settings.
        data: the folder of the statements, with a file `TRAIT.jsonl` for each trait.
        out: the folder of the run.
        stage: opens a progress bar for each stage.
        overwrite: delete the files of a study in `out` and start again.

    Raises:
        InputError: if a file of the data is missing or has too few statements.
        FileFormatError: if a file of the data has other content.
        OutputExistsError: if `out` holds other files, or a study with other settings.
        SoupError: if a training or a measurement fails.
    """
    splits = [_splits(study, data, seed) for seed in range(study.num_seeds)]
    folder = StudyFolder(out)
    if overwrite and folder.settings.is_file():
        folder.clear()
        for seed_folder in out.glob("seed-*"):
            shutil.rmtree(seed_folder)
    folder.begin(study.settings(data))
    costs = Costs(folder)
    runs = [SeedRun(study, seed, splits[seed], out / f"seed-{seed}") for seed in range(study.num_seeds)]
    for run in runs:
        with costs.stage(f"train {run.seed}"):
            run.train(stage)
        with costs.stage(f"measure {run.seed}"):
            run.measure(stage)
    return runs


def _splits(study: PersonaStudy, data: Path, seed: int) -> dict[str, TraitSplit]:
    return {
        trait: split_statements(
            read_statements(data, trait),
            num_train=study.num_train,
            num_validation=study.num_validation,
            num_test=study.num_test,
            seed=seed,
        )
        for trait in study.traits_of(seed)
    }
