"""`ScorerRewards`: the scorers of a catalogue as reward functions.

Shapes: N = items, D = base rewards.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from personalized_soups.declare.dimension import Catalogue, ClassifierScorer
from personalized_soups.errors import DeclarationError
from personalized_soups.files.digest import digest_file
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.classifiers.classifier import read_classifier_record
from personalized_soups.scoring.scales import Scales
from personalized_soups.scoring.scorers import Scorer

VALID = "valid"


class ScorerRewards:
    """The scorers of a catalogue as reward functions: a reward for each dimension with a scorer, and one for validity.

    The reward of a dimension is the scorer's value, 0 at the low end and 1 at the high end. A user who prefers the high
    end has a positive weight, and a user who prefers the low end a negative one. So an invalid answer must be at
    neither end: its reward is 0.5 in every dimension whose scorer finds it invalid.

    The last reward, `valid`, is 1 if all scorers find the answer valid, else 0. With it, weights can express that
    invalid answers are bad. For example, `Scored.toward("low")` is 0 for an invalid answer. Up to the constant 0.5, it
    is the sum of the rewards with the weights -1 for the dimension and 0.5 for `valid`.

    Attributes:
        names: the names of the dimensions, and `valid`.

    Args:
        catalogue: the catalogue that declares the dimensions and their scorers.
        scorers: functions that replace scorers of the catalogue, by the name of a dimension or side.

    Raises:
        DeclarationError: if no dimension has a scorer, a dimension is called `valid`, or a scorer cannot be imported.

    Example:
        >>> catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
        >>> rewards = ScorerRewards(catalogue)
        >>> rewards.names
        ('expertise', 'informativeness', 'style', 'valid')
        >>> rewards.features([TextItem("How do I clean a lamp?", "Dust it.")])[0, 1:].tolist()
        [0.0, 0.5, 1.0]
    """

    def __init__(self, catalogue: Catalogue, *, scorers: Mapping[str, Scorer] | None = None) -> None:
        self._catalogue = catalogue
        self._scorers = dict(scorers or {})
        self._scales = Scales(catalogue, scorers=scorers)
        # in the order of the catalogue, which is that of the scores
        self._dimensions = [name for name in catalogue.dimensions if name in self._scales.dimensions]
        if not self._dimensions:
            raise DeclarationError(
                "no dimension has a scorer",
                where=catalogue.place("dimensions"),
                mend="give a dimension a scorer, such as `scorer: {kind: length, low: 20, high: 120}`",
            )
        if VALID in self._dimensions:
            raise DeclarationError(
                f"a dimension is called {VALID!r}, which is the name of the reward of valid answers",
                where=catalogue.place("dimensions", VALID),
                mend="give the dimension another name",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the dimensions, and `valid`."""
        return (*self._dimensions, VALID)

    @cached_property
    def digest(self) -> str:
        """A hex digest of the catalogue, its classifiers, and the source files of scorers that are Python functions.

        It does not cover modules that those files import.
        """
        functions = {name: _source_digest(scorer) for name, scorer in self._scorers.items()}
        named = {
            function: _module_digest(function)
            for dimension in self._catalogue.dimensions.values()
            if (function := getattr(dimension.scorer, "function", None)) is not None
        }
        parts = ["scorer rewards 1", self._catalogue.model_dump(mode="json"), functions, named]
        # Without classifiers, the digest is that of earlier versions.
        if classifiers := self._classifiers():
            parts.append(classifiers)
        return str(blake3(json.dumps(parts, sort_keys=True).encode()).hexdigest())

    def _classifiers(self) -> dict[str, str]:
        """Return the digest of each classifier that the catalogue names, by its path."""
        specs = [dimension.scorer for dimension in self._catalogue.dimensions.values()]
        paths = {spec.path for spec in specs if isinstance(spec, ClassifierScorer)}
        return {path: read_classifier_record(self._catalogue.relative_path(path)).digest for path in sorted(paths)}

    def features(self, items: Sequence[TextItem], /) -> npt.NDArray[np.float64]:
        """Return [N, D], float64, in [0, 1].

        Raises:
            DeclarationError: if a scorer returns anything other than a Scored with a value in [0, 1].
        """
        rewards = np.empty((len(items), len(self.names)))
        for row, item in enumerate(items):
            scores = self._scales.scores(item.prompt, item.answer)
            rewards[row, :-1] = [score["value"] if score["is_valid"] else 0.5 for score in scores]
            rewards[row, -1] = all(score["is_valid"] for score in scores)
        return rewards


def _source_digest(function: object) -> str:
    """Return the digest of the file that defines a function, or its name if there is no file."""
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(type(function)))}"
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))  # type: ignore[arg-type]
    except TypeError:
        source = None
    return name if source is None or not Path(source).is_file() else f"{name} {digest_file(Path(source))}"


def _module_digest(function: str) -> str:
    """Return the digest of the file of `package.module:name`."""
    from importlib.util import find_spec

    spec = find_spec(function.partition(":")[0])
    origin = None if spec is None else spec.origin
    return digest_file(Path(origin)) if origin is not None and Path(origin).is_file() else ""
