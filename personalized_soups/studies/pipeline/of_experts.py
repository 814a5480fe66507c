"""Write the recipe that evaluates experts that somebody has trained: alone, in pairs and mixed, on any prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.dimension import AnyScorer, Catalogue, ClassifierScorer, Dimension
from personalized_soups.declare.loader import dump, load
from personalized_soups.declare.profile import MethodName
from personalized_soups.declare.run_recipe import RunRecipe
from personalized_soups.errors import InputError, UsageError, choose_from
from personalized_soups.generation.prompts import read_prompts
from personalized_soups.methods.plugins import is_method_name, method_names
from personalized_soups.studies.folder import write_text
from personalized_soups.studies.pipeline.run_folder import RECIPE_FOLDER, RunFolder

# The names of the systems.
SOUP, PROMPTED, PROMPTING, BASE = "soup", "soup-prompted", "prompting", "base"
_WEIGHTS = (0.2, 0.4, 0.6, 0.8, 1.0)
_MIN_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class ExpertsEvaluation:
    """What `psoups evaluate --experts` evaluates.

    Attributes:
        experts: the folder of the experts.
        base: the base: a name, a folder or a hub id.
        prompts: the file of prompts. Every second one chooses the method and the weight, and the others test.
        catalogue: the dimensions. Sides without an expert are left out.
        methods: the merge methods to try.
        weights: the weights to try.
        num_combinations: the number of combinations to draw, or None for all.
        temperature, max_new_tokens, batch_size: how answers are generated.
        seed: the random seed.
    """

    experts: Path
    base: str
    prompts: Path
    catalogue: Catalogue
    methods: Sequence[MethodName] = ("linear", "factor_average")
    weights: Sequence[float] = _WEIGHTS
    num_combinations: int | None = None
    temperature: float = 0.7
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0

    def write(self, folder: RunFolder) -> RunRecipe:
        """Write the recipe and its files into the folder of the run, and return the recipe.

        Raises:
            InputError: if there are too few prompts, or no expert is for a side of the catalogue.
            OutputExistsError: if the folder is of something else.
            UsageError: if a method is unknown, or `linear` is not among them.
        """
        if "linear" not in self.methods:
            raise UsageError(
                "the method linear is missing, by which experts are checked alone and in pairs",
                where="methods",
                mend="add linear",
            )
        for method in self.methods:
            if not is_method_name(method):
                raise UsageError(
                    f"{method!r} is not a known merge method",
                    where="methods",
                    mend=choose_from(method, method_names()),
                )
        suffix = self.prompts.suffix or ".txt"
        recipe = RunRecipe.model_validate_json(json.dumps(self._content(suffix)))
        catalogue = self.declared_catalogue()
        validation, test = self._split()
        folder.check()
        target = folder.root / RECIPE_FOLDER
        target.mkdir(parents=True, exist_ok=True)
        write_text(target / f"validation{suffix}", validation)
        write_text(target / f"test{suffix}", test)
        write_text(target / "dimensions.yaml", dump(catalogue))
        write_text(target / "recipe.yaml", dump(recipe))
        return load(target / "recipe.yaml", RunRecipe)

    def declared_catalogue(self) -> Catalogue:
        """Return the catalogue without the sides that have no expert.

        Raises:
            InputError: if no side has an expert.
        """
        library = ExpertLibrary.open(self.experts)
        dimensions = {
            name: self._with(dimension, set(library)) for name, dimension in self.catalogue.dimensions.items()
        }
        kept = {name: dimension for name, dimension in dimensions.items() if dimension is not None}
        if not kept:
            raise InputError(
                f"no expert is for a side of the catalogue: the experts are {', '.join(library)}, and the sides are "
                f"{', '.join(self.catalogue.sides)}",
                where=str(self.experts),
                mend="give the catalogue that declares the sides of these experts",
            )
        return self.catalogue.replaced(dimensions=kept)

    def _with(self, dimension: Dimension, experts: set[str]) -> Dimension | None:
        """Return a dimension with the sides that have an expert, or None. Paths become absolute: the file moves."""
        sides = {
            name: side if side.scorer is None else side.replaced(scorer=self._at_home(side.scorer))
            for name, side in dimension.sides.items()
            if name in experts
        }
        if not sides:
            return None
        scorer = None if dimension.scorer is None else self._at_home(dimension.scorer)
        return dimension.replaced(sides=sides, scorer=scorer)

    def _at_home(self, scorer: AnyScorer) -> AnyScorer:
        if not isinstance(scorer, ClassifierScorer):
            return scorer
        return scorer.replaced(path=str(self.catalogue.relative_path(scorer.path).absolute()))

    def _split(self) -> tuple[str, str]:
        """Return the lines of the prompts for validation and for the test."""
        if len(read_prompts(self.prompts)) < _MIN_PROMPTS:
            raise InputError(
                f"there are fewer than {_MIN_PROMPTS} prompts, which are too few to choose a weight and to test it",
                where=str(self.prompts),
                mend="give at least 20 prompts",
            )
        lines = [line for line in self.prompts.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        return "\n".join(lines[1::2]) + "\n", "\n".join(lines[::2]) + "\n"

    def _content(self, suffix: str) -> dict[str, Any]:
        generating = {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }
        test = {"prompts": f"test{suffix}", **generating}
        mixed = {"experts": "experts", "choice": "chosen"}
        steps: dict[str, Any] = {
            "experts": {"kind": "experts", "folder": str(self.experts.absolute())},
            "chosen": {
                "kind": "choose",
                "experts": "experts",
                "prompts": f"validation{suffix}",
                "weights": {method: list(self.weights) for method in self.methods},
                **generating,
            },
            BASE: {"kind": "answers", **test},
            PROMPTING: {"kind": "answers", "prompted": True, **test},
            SOUP: {"kind": "answers", **mixed, **test},
            PROMPTED: {"kind": "answers", "prompted": True, **mixed, **test},
            "interference": {"kind": "interference", **mixed, **test},
            "report": {
                "kind": "report",
                "systems": [BASE, PROMPTING, SOUP, PROMPTED],
                "primary": [SOUP, PROMPTING],
                "interference": "interference",
            },
        }
        content = {
            "base": str(Path(self.base).absolute()) if Path(self.base).is_dir() else self.base,
            "dimensions": "dimensions.yaml",
            "seed": self.seed,
            "steps": steps,
        }
        if self.num_combinations is not None:
            content["num_combinations"] = self.num_combinations
        return content
