"""Make the study of `psoups quickstart` from its options and the table of named bases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from personalized_soups.cli.bases import resolve_base
from personalized_soups.cli.study.workers import num_workers
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.declare.base_table import NamedBase
    from personalized_soups.declare.training import TrainingRecipe
    from personalized_soups.studies.prompt_sources import PromptSource
    from personalized_soups.studies.study import Study

# A base without a name has the recipes and the prompts of this base.
_DEFAULT = "smollm2"


@dataclass(frozen=True, slots=True)
class StudyOptions:
    """The options that settle a study. A file that is None is the one that the table of named bases has for the base.

    Attributes:
        base: the value of --base.
        basis: `free` or `shared`.
        recipe: the recipe of the study.
        train_recipe: the training recipe of the experts.
        dimensions: the catalogue.
        prompts: the file of prompts.
        full: whether to run the full study of the base.
        seed: the random seed.
        workers: the number of worker processes, or 0 for one for each core.
        device: `auto`, `cpu` or `cuda`.
    """

    base: str
    basis: str
    recipe: Path | None
    train_recipe: Path | None
    dimensions: Path | None
    prompts: Path | None
    full: bool
    seed: int
    workers: int
    device: str

    def study(self) -> Study:
        """Load all files, and return the study.

        Raises:
            SoupError: if a file or the base is missing or invalid, or the base has no full study.
        """
        from personalized_soups.declare.base_table import named_bases
        from personalized_soups.declare.dimension import Catalogue
        from personalized_soups.declare.evaluation import StudyRecipe
        from personalized_soups.declare.loader import load
        from personalized_soups.declare.shipped import shipped_recipe
        from personalized_soups.studies.study import Study

        bases = named_bases()
        row = bases.get(self.base, bases[_DEFAULT])
        basis = self._checked_basis()
        return Study(
            seed=self.seed,
            basis=basis,
            num_workers=num_workers(self.workers),
            device=self.device,
            recipe=load(self.recipe or self._study_recipe(row), StudyRecipe),
            training=_training(self.train_recipe or shipped_recipe(row.train), basis),
            catalogue=load(self.dimensions or shipped_recipe(row.dimensions), Catalogue),
            prompts=_prompts(self.prompts, row),
            base=_place(self.base),
        )

    def _checked_basis(self) -> Literal["free", "shared"]:
        if self.basis not in {"free", "shared"}:
            raise UsageError(
                f"unknown basis {self.basis!r}", where="--basis", mend="give --basis free, or give --basis shared"
            )
        return "shared" if self.basis == "shared" else "free"

    def _study_recipe(self, row: NamedBase) -> Path:
        from personalized_soups.declare.shipped import shipped_recipe

        name = row.full_study if self.full else row.study
        if name is None:
            raise UsageError(
                f"the base {self.base!r} has no {'full ' if self.full else ''}study",
                where="--full" if self.full else "--base",
                mend="leave out --full" if self.full else "give the recipe of a study: --recipe FILE",
            )
        return shipped_recipe(name)


def _place(base: str) -> Path | str:
    """Return the folder of a base as a path, or its hub id."""
    place = resolve_base(base)
    return Path(place) if Path(place).is_dir() else place


def _training(path: Path, basis: Literal["free", "shared"]) -> TrainingRecipe:
    """Return the recipe for a basis. `NAME-shared.yaml` next to a recipe replaces it if the basis is shared."""
    from personalized_soups.declare.loader import load
    from personalized_soups.declare.training import TrainingRecipe

    own = path.with_name(f"{path.stem}-shared{path.suffix}")
    recipe = load(own if basis == "shared" and own.is_file() else path, TrainingRecipe)
    return recipe if recipe.basis == basis else recipe.replaced(basis=basis)


def _prompts(path: Path | None, row: NamedBase) -> PromptSource:
    from personalized_soups.declare.prompt_set import load_prompt_set
    from personalized_soups.declare.shipped import shipped_recipe
    from personalized_soups.studies.prompt_sources import TinyPrompts

    if path is None and row.prompts is None:
        return TinyPrompts()
    return load_prompt_set(path or shipped_recipe(str(row.prompts)))
