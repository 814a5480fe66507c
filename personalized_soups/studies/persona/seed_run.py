"""One seed of the study: its experts, the measurements, and the choice of weights."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, fsum
from pathlib import Path
from typing import Any

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.merging.writing.adapter import merge
from personalized_soups.merging.writing.into_base import merge_into_base
from personalized_soups.methods.plugins import find_method
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.margin_forecast import MarginForecast
from personalized_soups.studies.persona.combinations import (
    Combination,
    Forecasts,
    Soup,
    best_scale,
    combinations,
    expert_name,
    fitted_weights,
    mean_agreement,
)
from personalized_soups.studies.persona.experts import catalogue, expert_pairs, joint_pairs, write_once
from personalized_soups.studies.persona.measuring import MarginStore
from personalized_soups.studies.persona.settings import (
    CHOSEN,
    FACTOR_SCALES,
    FACTORS,
    FITTED,
    JOINT,
    PAPER,
    SIGNED,
    THIRD,
    PersonaStudy,
)
from personalized_soups.studies.persona.statements import TraitSplit
from personalized_soups.studies.study import Stage, TrainingBar
from personalized_soups.training.parallel import ExpertJob, train_experts


@dataclass(frozen=True, slots=True)
class SeedRun:
    """The experts and measurements of one seed.

    Attributes:
        study: the settings.
        seed: the seed.
        splits: the statements of each trait.
        folder: the folder of the seed.
    """

    study: PersonaStudy
    seed: int
    splits: Mapping[str, TraitSplit]
    folder: Path

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the experts."""
        return tuple(
            expert_name(trait, has_trait=sign) for trait in self.study.traits_of(self.seed) for sign in (True, False)
        )

    @property
    def validation(self) -> MarginStore:
        """The margins of the validation statements."""
        return MarginStore(
            self.folder / "validation", {trait: split.validation for trait, split in self.splits.items()}
        )

    def test(self, triple: Sequence[str] | None = None) -> MarginStore:
        """Return the margins of the test statements: those of a group of traits, or those of all traits."""
        traits = self.splits if triple is None else triple
        name = "all" if triple is None else "+".join(triple)
        return MarginStore(self.folder / "test" / name, {trait: self.splits[trait].test for trait in traits})

    def train(self, stage: Stage) -> None:
        """Train the experts and the joint adapters that do not exist yet."""
        study = self.study
        jobs = []
        for trait in study.traits_of(self.seed):
            for sign in (True, False):
                name = expert_name(trait, has_trait=sign)
                pairs = expert_pairs(self.splits, trait, has_trait=sign, num_ties=study.num_ties)
                data = write_once(self.folder / "pairs" / f"{name}.jsonl", pairs)
                jobs.append(ExpertJob(name, data, self.folder / "experts" / name))
        declared = catalogue(study.traits_of(self.seed))
        options: dict[str, Any] = {"base": study.base, "device": study.device, "seed": self.seed, "resume": True}
        with stage(f"seed {self.seed}: training {len(jobs)} experts", None) as bar:
            train_experts(
                jobs,
                recipe=study.training,
                catalogue=declared,
                workers=study.num_workers,
                progress=TrainingBar(bar, len(jobs)),
                **options,
            )
        joint = [
            ExpertJob(
                combination.name,
                write_once(self.folder / "pairs" / f"{combination.name}.jsonl", joint_pairs(self.splits, combination)),
                self.folder / "joint" / combination.name,
            )
            for combination in study.joint_of(self.seed)
        ]
        if joint:
            num_traits = len(study.triples[0])
            with stage(f"seed {self.seed}: training {len(joint)} adapters on whole combinations", None) as bar:
                train_experts(
                    joint,
                    recipe=_longer(study.training, num_traits * study.num_train / (study.num_train + study.num_ties)),
                    workers=study.num_workers,
                    progress=TrainingBar(bar, len(joint)),
                    **options,
                )

    def measure(self, stage: Stage) -> None:
        """Measure the base, the experts, the soups and the joint adapters that are not measured yet."""
        study = self.study
        if self._is_measured():
            return
        model = SoupModel.from_pretrained(study.base, self.folder / "experts", device=study.device)
        names = ["base", *self.experts]
        with stage(f"seed {self.seed}: measuring the base and its experts", 2 * len(names)) as bar:
            for at, (store, name) in enumerate(itertools.product((self.validation, self.test()), names), start=1):
                store.measure(model, name, None if name == "base" else {name: 1.0})
                bar.update(at)
        for triple in study.triples_of(self.seed):
            self._measure_factor_scales(model, triple, stage)
            self._measure_soups(model, triple, stage)
        self._measure_joint(model, stage)

    def _is_measured(self) -> bool:
        triples = self.study.triples_of(self.seed)
        return all(
            self.test(triple).has(f"{system} {combination.name}")
            for triple in triples
            for system in self.study.systems_of(self.seed, triple)
            for combination in combinations(triple)
        ) and all(self.test(triples[0]).has(f"{JOINT} {one.name}") for one in self.study.joint_of(self.seed))

    def _measure_factor_scales(self, model: SoupModel, triple: Sequence[str], stage: Stage) -> None:
        """Measure validation statements under factor averages. Their margins are not linear in the weights."""
        store = self._validation_of(triple)
        jobs = list(itertools.product(FACTOR_SCALES, combinations(triple)))
        with stage(f"seed {self.seed}: choosing the weight of factor_average for {_short(triple)}", len(jobs)) as bar:
            for at, (scale, combination) in enumerate(jobs, start=1):
                soup = Soup.uniform("factor_average", combination.experts, scale)
                self._measure_soup(model, store, f"{scale:.2f} {combination.name}", soup)
                bar.update(at)

    def _measure_soups(self, model: SoupModel, triple: tuple[str, ...], stage: Stage) -> None:
        store = self.test(triple)
        systems = self.study.systems_of(self.seed, triple)
        jobs = list(itertools.product(systems, combinations(triple)))
        with stage(f"seed {self.seed}: measuring soups of {_short(triple)}", len(jobs)) as bar:
            for at, (system, combination) in enumerate(jobs, start=1):
                self._measure_soup(model, store, f"{system} {combination.name}", self.soup(system, combination))
                bar.update(at)

    def _measure_joint(self, model: SoupModel, stage: Stage) -> None:
        chosen = self.study.joint_of(self.seed)
        if not chosen:
            return
        store = self.test(chosen[0].traits)
        with stage(f"seed {self.seed}: measuring adapters of whole combinations", len(chosen)) as bar:
            for at, combination in enumerate(chosen, start=1):
                name = f"{JOINT} {combination.name}"
                if not store.has(name):
                    store.measure_adapter(model, name, self.folder / "joint" / combination.name)
                bar.update(at)

    def _measure_soup(self, model: SoupModel, store: MarginStore, name: str, soup: Soup) -> None:
        if store.has(name):
            return
        if soup.method == "linear":
            store.measure(model, name, soup.weights)
            return
        folder = self.folder / "merged" / soup.method / name
        profile = Profile(user="soup", method=soup.method, weights=soup.weights, allow_opposed=True)
        library = ExpertLibrary.open(self.folder / "experts")
        if "stacked" not in find_method(soup.method).encodings:
            merge_into_base(library, profile, self.study.base, folder, overwrite=True)
            store.measure(SoupModel.from_pretrained(folder, [], device=self.study.device), name, None)
        else:
            merge(library, profile).write(folder, overwrite=True)
            store.measure_adapter(model, name, folder)
        shutil.rmtree(folder)

    def _validation_of(self, triple: Sequence[str]) -> MarginStore:
        return MarginStore(
            self.folder / "validation" / "+".join(triple), {trait: self.splits[trait].validation for trait in triple}
        )

    def soup(self, system: str, combination: Combination) -> Soup:
        """Return the soup of a system for a combination. Its weights are chosen on the validation statements."""
        forecasts = self.forecasts(self.validation)
        triple = combination.traits
        if system == THIRD:
            return Soup.uniform("linear", combination.experts, 1 / len(triple))
        if system == PAPER:
            return Soup.uniform("factor_average", combination.experts, 1 / len(triple))
        if system == FACTORS:
            return Soup.uniform("factor_average", combination.experts, self.factor_scale(triple))
        if system in {FITTED, SIGNED}:
            signs = (True,) if system == SIGNED else (True, False)
            names = [expert_name(trait, has_trait=sign) for trait in triple for sign in signs]
            return Soup("linear", fitted_weights(forecasts, combination, names))
        scale = best_scale(forecasts, combinations(triple))
        return Soup.uniform("linear" if system == CHOSEN else system, combination.experts, scale)

    def factor_scale(self, triple: Sequence[str]) -> float:
        """Return the weight of factor_average with the best mean agreement on the validation statements."""
        store = self._validation_of(triple)

        def value(scale: float) -> float:
            return fsum(
                mean_agreement(store.margins(f"{scale:.2f} {combination.name}"), combination)
                for combination in combinations(triple)
            )

        return max(FACTOR_SCALES, key=value)

    def forecasts(self, store: MarginStore) -> Forecasts:
        """Return the forecast of each trait's statements from the stored margins of the base and the experts."""
        base = store.margins("base")
        alone = {name: store.margins(name) for name in self.experts}
        return {
            trait: MarginForecast.of(base[trait], {name: margins[trait] for name, margins in alone.items()})
            for trait in base
        }


def _longer(recipe: TrainingRecipe, times: float) -> TrainingRecipe:
    """Return the recipe with more steps, so that an adapter sees each of its many pairs as often as an expert does."""
    optimizer = recipe.optimizer
    longer = {"max_steps": ceil(optimizer.max_steps * times)} if optimizer.max_steps else {"epochs": optimizer.epochs}
    return recipe.replaced(optimizer=optimizer.replaced(**longer))


def _short(triple: Sequence[str]) -> str:
    return ", ".join(triple)
