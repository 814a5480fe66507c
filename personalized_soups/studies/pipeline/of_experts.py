"""Write the recipe that evaluates experts that somebody has trained: alone, in pairs and mixed, on any prompts."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.dimension import AnyScorer, Catalogue, ClassifierScorer, Dimension
from personalized_soups.declare.loader import dump, load, load_data
from personalized_soups.declare.profile import MethodName
from personalized_soups.declare.run_recipe import RunRecipe
from personalized_soups.errors import InputError, UsageError
from personalized_soups.generation.prompts import prompt_lines, read_prompts
from personalized_soups.studies.folder import write_text

# The names of the systems.
SOUP, PROMPTED, PROMPTING, BASE = "soup", "soup-prompted", "prompting", "base"
_WEIGHTS = (0.2, 0.4, 0.6, 0.8, 1.0)
_MIN_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class ExpertsEvaluation:
    """What `psoups evaluate` evaluates without a recipe.

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
        on: the adapter on top of which the experts were trained, or None.
        dtype: the dtype of the base.
    """

    experts: Path
    base: str
    prompts: Path
    catalogue: Catalogue
    methods: Sequence[MethodName] = ("linear", "factor_average")
    weights: Sequence[float] = _WEIGHTS
    num_combinations: int | None = 16
    temperature: float = 0.7
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0
    on: Path | None = None
    dtype: str = "float32"

    def write(self, folder: Path) -> RunRecipe:
        """Write the recipe and its files into a folder, and return the recipe.

        Files of prompts are named after their digest, so that a run that is going on keeps its own.

        Raises:
            InputError: if there are too few prompts, or no expert is for a side of the catalogue.
            DeclarationError: if a method, a weight or the dtype is invalid.
            UsageError: if `linear` is not among the methods.
        """
        if "linear" not in self.methods:
            raise UsageError(
                "the method linear is missing, by which experts are checked alone and in pairs",
                where="methods",
                mend="add linear",
            )
        validation, test = self._split()
        names = [self._file_name("validation", validation), self._file_name("test", test)]
        recipe = load_data(self._content(*names), RunRecipe, "the options")
        catalogue = self.declared_catalogue()
        folder.mkdir(parents=True, exist_ok=True)
        for name, lines in zip(names, (validation, test), strict=True):
            (folder / name).write_bytes(lines)
        write_text(folder / "dimensions.yaml", dump(catalogue))
        write_text(folder / "recipe.yaml", dump(recipe))
        return load(folder / "recipe.yaml", RunRecipe)

    def _file_name(self, name: str, lines: bytes) -> str:
        return f"{name}-{blake3(lines).hexdigest(length=4)}{self.prompts.suffix or '.txt'}"

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

    def _split(self) -> tuple[bytes, bytes]:
        """Return the lines of the prompts for validation and for the test. A repeated prompt counts once."""
        numbered = prompt_lines(self.prompts)
        lines = dict(zip(read_prompts(self.prompts), (line for _, line in numbered), strict=True))
        if len(lines) < _MIN_PROMPTS:
            raise InputError(
                f"there are fewer than {_MIN_PROMPTS} different prompts: too few to choose a weight and to test it",
                where=str(self.prompts),
                mend="give at least 20 prompts",
            )
        kept = [line.removeprefix(BOM_UTF8).strip() + b"\n" for line in lines.values()]
        return b"".join(kept[1::2]), b"".join(kept[::2])

    def _content(self, validation: str, test_prompts: str) -> dict[str, Any]:
        generating = {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }
        test = {"prompts": test_prompts, **generating}
        mixed = {"experts": "experts", "choice": "chosen"}
        steps: dict[str, Any] = {
            "experts": {"kind": "experts", "folder": str(self.experts.absolute())},
            "chosen": {
                "kind": "choose",
                "experts": "experts",
                "prompts": validation,
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
            "dtype": self.dtype,
            "steps": steps,
        }
        if self.on is not None:
            content["on"] = str(self.on.absolute())
        if self.num_combinations is not None:
            content["num_combinations"] = self.num_combinations
        return content
