"""`ScoredAnswers`: how a scorer rates the answers of each candidate's soup to a user's prompts.

Shapes: C = candidates, N = prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Literal, TypeAlias

import numpy as np

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.expert_weights import ExpertWeights, ProfileLike
from personalized_soups.errors import DeclarationError, UsageError, choose_from
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.plugins import GROUP
from personalized_soups.scoring.scorers import Scorer, plugin_scorer, python_scorer, scorer_of
from personalized_soups.users.tuning.objective import Floats

# Rates an answer to a prompt. Higher is better.
Rating: TypeAlias = Callable[[str, str], float]

# Random numbers are chosen by a seed of 32 bits. Each draw has its own range of seeds.
_SEEDS = 1 << 32


class ScoredAnswers:
    """The rating of the answer to each prompt. An `Objective`.

    All candidates answer with the same random numbers, which depend on the seed, the draw and the prompt.

    Attributes:
        name: what is measured.

    Args:
        model: the base with the experts. It needs a tokenizer.
        prompts: prompts like those that the user will write.
        rating: a function that rates an answer to a prompt. Higher is better. `rating_of` makes one of a scorer's name.
        name: the name of the rating, for tables.
        max_new_tokens: the maximum number of tokens of an answer.
        temperature: the sampling temperature. At 0, the most likely token is taken.
        seed: the seed of the random numbers.
        batch_size: the number of answers that are generated at once.

    Raises:
        UsageError: if there are no prompts, or `batch_size` is less than 1.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> shortness = ScoredAnswers(
        ...     model, ["How do I clean a lamp?"], lambda prompt, answer: -len(answer), max_new_tokens=4
        ... )
        >>> shortness.scores([ExpertWeights({"concise": 1.0}), ExpertWeights()], [0], draw=0).shape
        (2, 1)
    """

    def __init__(
        self,
        model: SoupModel,
        prompts: Sequence[str],
        rating: Rating,
        *,
        name: str = "score",
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if not prompts:
            raise UsageError("there are no prompts", where="prompts", mend="give at least one prompt")
        if batch_size < 1:
            raise UsageError(
                f"batch_size is {batch_size}, but must be at least 1", where="batch_size", mend="give batch_size=64"
            )
        self.name = name
        self._model = model
        self._prompts = list(prompts)
        self._rating = rating
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._seed = seed
        self._batch_size = batch_size

    @property
    def num_items(self) -> int:
        """The number of prompts."""
        return len(self._prompts)

    def scores(self, candidates: Sequence[ExpertWeights], items: Sequence[int], *, draw: int) -> Floats:
        """Return [C, N], float64: the rating of each candidate's answer to each prompt.

        Raises:
            SoupError: in the same cases as `SoupModel.generate`, and if the scorer raises one.
        """
        prompts = [self._prompts[item] for item in items]
        profiles: list[ProfileLike] = [candidate for candidate in candidates for _ in items]
        answers: list[str] = self._model.generate(
            prompts * len(candidates),
            profiles,
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            seed=self._seed + draw * _SEEDS,
            batch_size=self._batch_size,
            # Answers to one prompt have equal places, so all candidates get the same random numbers.
            places=list(items) * len(candidates),
        )
        ratings = [
            self._rating(prompt, answer) for prompt, answer in zip(prompts * len(candidates), answers, strict=True)
        ]
        return np.asarray(ratings, dtype=np.float64).reshape(len(candidates), len(items))


def rating_of(name: str, catalogue: Catalogue) -> Rating:
    """Return the rating that a scorer's name selects. Its values are in [0, 1].

    Args:
        name: the name of a side (how well an answer fits the side), of a dimension (how far an answer lies toward its
            high end), of a function as `package.module:function`, or of a scorer that an installed package provides.
        catalogue: the catalogue that declares the sides and dimensions.

    Raises:
        DeclarationError: if nothing has this name, the side or dimension has no scorer, or the scorer cannot be
            imported.

    Example:
        >>> rating = rating_of("concise", load(shipped_recipe("dimensions/psoups.yaml"), Catalogue))
        >>> rating("How do I clean a lamp?", "Dust it.")
        1.0
    """
    if name in catalogue.sides:
        return _toward(scorer_of(catalogue, name), catalogue.sides[name].end)
    if name in catalogue.dimensions:
        return _toward(scorer_of(catalogue, _some_side(catalogue, name)), "high")
    if ":" in name:
        return _toward(python_scorer(name, where="scorer"), "high")
    if name in _installed():
        return _toward(plugin_scorer(name, where="scorer"), "high")
    raise DeclarationError(
        f"no side, dimension or installed scorer is called {name!r}",
        where="scorer",
        mend=choose_from(name, [*catalogue.sides, *catalogue.dimensions, *_installed()]),
    )


def _installed() -> list[str]:
    return sorted({entry_point.name for entry_point in entry_points(group=GROUP)})


def _toward(scorer: Scorer, end: Literal["low", "high"]) -> Rating:
    return lambda prompt, answer: scorer(prompt, answer).toward(end)


def _some_side(catalogue: Catalogue, dimension: str) -> str:
    """Return a side that is scored by the scorer of its dimension."""
    for name, side in catalogue.dimensions[dimension].sides.items():
        if side.scorer is None:
            return name
    raise DeclarationError(
        f"every side of the dimension {dimension!r} has its own scorer, so no scorer is that of the dimension",
        where="scorer",
        mend="name a side instead of the dimension",
    )
