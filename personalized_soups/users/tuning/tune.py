"""`tune_weights`: search the weights with which a soup fits a user's data best, without gradients.

Shapes: F = finalists with the start before them, N = items of the user's data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from personalized_soups.declare.expert_weights import ExpertWeights, Weight
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import UsageError
from personalized_soups.mixing.model import SoupModel
from personalized_soups.users.tuning.evolution import Evolution
from personalized_soups.users.tuning.layer_groups import layer_groups as groups_of
from personalized_soups.users.tuning.objective import Floats, Objective
from personalized_soups.users.tuning.space import SearchSpace

# One of so many items is kept from the search.
_VALIDATION = 3

# The number of candidates, besides the mean of the last generation, that are compared with the start at the end.
_FINALISTS = 3

# All candidates of the search get the same random numbers. The decision uses others, because the best candidates of the
# search are partly those with which its random numbers agree.
_SEARCH_DRAW, _DECISION_DRAW = 0, 1


@dataclass(frozen=True, slots=True)
class Measured:
    """Weights with their mean scores in the decision. Higher is better.

    Attributes:
        weights: the weight of each expert. It is a mapping from layer patterns to numbers if there are layer groups.
        search: the mean over the items with which the search was made.
        validation: the mean over the items that were kept from the search. With a single item, it is the same item.
        overall: the mean over all items.
    """

    weights: Mapping[str, Weight]
    search: float
    validation: float
    overall: float


@dataclass(frozen=True, slots=True)
class Tuning:
    """The result of a search.

    Attributes:
        measure: what the scores are.
        start: the start.
        best: the best candidate of the search; None if no candidate differs from the start.
        is_better: whether `best` has higher scores than the start, on the validation items and on all items.
        num_search: the number of items with which the search was made.
        num_validation: the number of items that were kept from the search.
        num_evaluations: the number of candidates that were evaluated in the search.
        num_generations: the number of generations, with an incomplete last one.
        is_stopped: whether the search was stopped before its budget was used.
        allow_opposed: whether opposed sides may have weights.
    """

    measure: str
    start: Measured
    best: Measured | None
    is_better: bool
    num_search: int
    num_validation: int
    num_evaluations: int
    num_generations: int
    is_stopped: bool
    allow_opposed: bool = False

    @property
    def chosen(self) -> Measured:
        """The best candidate if it is better than the start, else the start."""
        return self.best if self.best is not None and self.is_better else self.start

    def profile(self, user: str) -> Profile | None:
        """Return the profile of the chosen weights.

        The result is None if all weights are 0, or differ between layers: no profile can express that.
        """
        weights = {name: weight for name, weight in self.chosen.weights.items() if isinstance(weight, float)}
        if not weights or len(weights) != len(self.chosen.weights):
            return None
        profile = Profile(user=user, weights=weights)
        # A field that is set is written to files, so the default is not set.
        return profile.replaced(allow_opposed=True) if self.allow_opposed else profile


def tune_weights(
    model: SoupModel,
    objective: Objective,
    *,
    start: Profile | None = None,
    budget: int = 100,
    population: int | None = None,
    sigma: float = 0.5,
    limit: float = 1.5,
    layer_groups: int | None = None,
    allow_opposed: bool = False,
    seed: int = 0,
    on_generation: Callable[[int, float], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Tuning:
    """Search the weights that score best on a user's data, with CMA-ES.

    A third of the items is kept from the search. At the end, the start and the best candidates are measured on all
    items in one call of the objective, with new random numbers. A candidate is chosen only if its means over the
    validation items and over all items are greater than those of the start. So the chosen weights never score lower on
    the user's data than the start in this measurement, whatever the objective returns.

    Args:
        model: the base with the experts.
        objective: how well weights fit the user's data, such as a `TextLikelihood` or `ScoredAnswers`.
        start: the profile from which the search starts. None starts from the base alone.
        budget: the number of candidates that the search evaluates. The decision evaluates up to 5 more.
        population: the number of candidates of a generation, which is one call of the objective. By default
            4 + 3 ln X for X numbers to search, rounded down.
        sigma: the standard deviation of the first generation around the start.
        limit: each number is searched in [-limit, limit].
        layer_groups: search separate weights for so many contiguous groups of layers. None gives all layers the same
            weights.
        allow_opposed: search a weight for each expert. By default, one signed number is used for two experts of opposed
            sides. A start that has `allow_opposed: true` implies it.
        seed: the seed of the candidates and of the split of the items.
        on_generation: called after each generation with the number of evaluated candidates and the best score.
        stop: called before each generation. If it returns True, the search ends, and the best candidates so far are
            compared with the start.

    Raises:
        UsageError: if a number is out of range, the start is outside the limit, the model has no experts, the start has
            a rank or another method than linear, or the package `cmaes` is not installed.
        DeclarationError: if the start names an unknown expert or opposed sides.
        SoupError: if the objective raises one.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> history = [Example(prompt="How do I clean a lamp?", text="Dust the lamp.")] * 3
        >>> tuning = tune_weights(model, TextLikelihood(model, history), budget=7)
        >>> tuning.chosen.overall >= tuning.start.overall
        True
    """
    if budget < 1:
        raise UsageError(f"budget is {budget}, but must be at least 1", where="budget", mend="give budget=100")
    if not objective.num_items:
        raise UsageError("the objective has no items", where="objective", mend="give it at least one example or prompt")
    if not model.experts:
        raise UsageError("the model has no experts, so there are no weights", where="experts", mend="add experts")
    begun = dict(model.resolve(start).at(0))
    allow_opposed = allow_opposed or (start is not None and start.allow_opposed)
    groups = None if layer_groups is None else groups_of(list(model.layers.by_name), layer_groups)
    space = SearchSpace(list(model.experts), None if allow_opposed else SideRule.of(model.experts.values()), groups)
    numbers = {name: weight for name, weight in begun.items() if isinstance(weight, float)}
    evolution = Evolution(space.vector(numbers), sigma=sigma, limit=limit, population=population, seed=seed)
    searched, validation = _split(objective.num_items, seed)
    search = _Search(space, evolution, objective, searched)
    while search.num_done < budget and not search.is_over:
        if stop is not None and stop():
            search.is_stopped = True
            break
        search.run(min(evolution.population, budget - search.num_done))
        if on_generation is not None:
            on_generation(search.num_done, search.best_score)
    finalists = [weights for weights in search.finalists() if weights != begun]
    first, *others = _measured(objective, [begun, *finalists], searched, validation)
    better = [each for each in others if each.validation > first.validation and each.overall > first.overall]
    return Tuning(
        measure=objective.name,
        start=first,
        best=max(better or others, key=lambda each: each.validation, default=None),
        is_better=bool(better),
        num_search=len(searched),
        num_validation=len(validation),
        num_evaluations=search.num_done,
        num_generations=search.num_generations,
        is_stopped=search.is_stopped,
        allow_opposed=allow_opposed,
    )


class _Search:
    """The generations of a search, and the candidates that were evaluated."""

    def __init__(self, space: SearchSpace, evolution: Evolution, objective: Objective, items: Sequence[int]) -> None:
        self.num_done = 0
        self.num_generations = 0
        self.is_stopped = False
        self._space = space
        self._evolution = evolution
        self._objective = objective
        self._items = items
        self._evaluated: list[tuple[float, dict[str, Weight]]] = []

    @property
    def is_over(self) -> bool:
        return self._evolution.has_converged

    @property
    def best_score(self) -> float:
        return max(score for score, _ in self._evaluated)

    def run(self, count: int) -> None:
        """Evaluate one generation of `count` candidates."""
        vectors = self._evolution.ask(count)
        weights = [self._space.weights(vector) for vector in vectors]
        candidates = [ExpertWeights(each) for each in weights]
        scores_P = _scores(self._objective, candidates, self._items, draw=_SEARCH_DRAW).mean(axis=1)
        # CMA-ES learns from whole generations only. The last one may be cut by the budget.
        if count == self._evolution.population:
            self._evolution.tell(vectors, scores_P)
        comparable = np.where(np.isfinite(scores_P), scores_P, -np.inf)
        self._evaluated += zip(comparable.tolist(), weights, strict=True)
        self.num_done += count
        self.num_generations += 1

    def finalists(self) -> list[dict[str, Weight]]:
        """Return different weights: the best candidates, and the mean of the distribution."""
        found: list[dict[str, Weight]] = []
        for _, weights in sorted(self._evaluated, key=lambda pair: -pair[0]):
            if len(found) < _FINALISTS and weights not in found:
                found.append(weights)
        mean = self._space.weights(self._evolution.mean)
        return found if mean in found else [*found, mean]


def _split(num_items: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the items of the search and of the validation. A single item is both."""
    order = np.random.default_rng(seed).permutation(num_items).tolist()
    num_validation = max(1, num_items // _VALIDATION)
    return sorted(order[num_validation:] or order), sorted(order[:num_validation])


def _measured(
    objective: Objective, candidates: Sequence[Mapping[str, Weight]], searched: Sequence[int], validation: Sequence[int]
) -> list[Measured]:
    """Return the candidates with their scores on all items, from one call of the objective."""
    items = list(range(objective.num_items))
    scores_FN = _scores(objective, [ExpertWeights(each) for each in candidates], items, draw=_DECISION_DRAW)
    return [
        Measured(weights, *(float(row_N[some].mean()) for some in (list(searched), list(validation), items)))
        for weights, row_N in zip(candidates, scores_FN, strict=True)
    ]


def _scores(objective: Objective, candidates: Sequence[ExpertWeights], items: Sequence[int], *, draw: int) -> Floats:
    scores = np.asarray(objective.scores(candidates, items, draw=draw), dtype=np.float64)
    if scores.shape != (len(candidates), len(items)):
        raise UsageError(
            f"the objective returned scores of shape {scores.shape} for {len(candidates)} candidates and "
            f"{len(items)} items",
            where="objective",
            mend="return one row for each candidate, with one number for each item",
        )
    return scores
