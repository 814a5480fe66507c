"""The search finds the weights that wrote a user's texts, and never returns anything worse than its start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups import ExpertWeights, Profile, SoupModel, TextLikelihood, tune_weights
from personalized_soups.errors import DeclarationError, UsageError
from personalized_soups.users.tuning.tune import Tuning
from tests.experts import SHAPES, write_expert, write_record
from tests.mixing.worlds import open_model, vocab_of
from tests.users.tuning.test_likelihood import counted
from tests.users.tuning.worlds import TEXT_TOKENS, Noise, Peak, Scores, texts_of

TRUE = {"cold": 0.9, "warm": -0.6}


@pytest.fixture
def strong(tmp_path: Path, small_base: Path) -> tuple[SoupModel, list[Path]]:
    """A model whose experts change it enough to be recognised in a few texts, and the folders of the experts.

    They adapt the output layer, too: in a random model, the other layers hardly change the next token.
    """
    shapes = {**SHAPES, "lm_head": (vocab_of(small_base), 64)}
    folders = [
        write_expert(tmp_path / "strong" / name, seed=seed, alpha=16, shapes=shapes)
        for seed, name in enumerate(("cold", "plain", "warm"), start=1)
    ]
    return open_model(small_base, tmp_path / "strong"), folders


def test_the_weights_that_wrote_the_texts_are_found(strong: tuple[SoupModel, list[Path]], small_base: Path) -> None:
    model, folders = strong
    texts = texts_of(small_base, folders, TRUE, 24)
    likelihood = TextLikelihood(model, texts)
    start, true = likelihood.scores([ExpertWeights(), ExpertWeights(TRUE)], range(24), draw=0).mean(axis=1)
    tuning = tune_weights(model, likelihood, budget=140)
    # The likeliest of 3 weights gains half the chi-square of 3 degrees of freedom, 8 nats at most in 999 of 1000
    # worlds, on the texts of the search, and may lose as much on the others.
    margin = 8 / (TEXT_TOKENS * tuning.num_search)
    assert true - start > 5 * margin
    assert tuning.is_better
    assert tuning.start.overall == pytest.approx(start, abs=1e-5)
    assert abs(tuning.chosen.overall - true) < margin
    for name in ("cold", "plain", "warm"):
        assert tuning.chosen.weights.get(name, 0.0) == pytest.approx(TRUE.get(name, 0.0), abs=0.15)
    profile = tuning.profile("ada")
    assert profile is not None
    assert (profile.user, profile.weights) == ("ada", tuning.chosen.weights)


def test_a_search_that_starts_at_the_truth_stays_near_it(
    strong: tuple[SoupModel, list[Path]], small_base: Path
) -> None:
    model, folders = strong
    likelihood = TextLikelihood(model, texts_of(small_base, folders, TRUE, 24, seed=1))
    tuning = tune_weights(model, likelihood, start=Profile(weights=TRUE), budget=42, sigma=0.1)
    assert tuning.start.weights == TRUE
    assert tuning.chosen.overall >= tuning.start.overall
    for name, weight in TRUE.items():
        assert tuning.chosen.weights[name] == pytest.approx(weight, abs=0.15)


def test_a_generation_is_one_forward_pass(model: SoupModel, folders: list[Path], small_base: Path) -> None:
    likelihood = TextLikelihood(model, texts_of(small_base, folders, TRUE, 6))
    told: list[tuple[int, float]] = []
    with counted(model) as rows:
        tuning = tune_weights(
            model, likelihood, budget=20, population=8, on_generation=lambda done, best: told.append((done, best))
        )
    # 4 of 6 texts are searched; the last pass is the decision: the start and up to 4 finalists on all texts
    assert rows[:-1] == [8 * 4, 8 * 4, 4 * 4]
    assert rows[-1] in {6 * 5, 6 * 4}
    assert [done for done, _ in told] == [8, 16, 20]
    assert told[0][1] <= told[1][1] <= told[2][1] < 0
    assert (tuning.num_evaluations, tuning.num_generations) == (20, 3)
    assert (tuning.num_search, tuning.num_validation) == (4, 2)


def test_the_seed_decides(model: SoupModel, folders: list[Path], small_base: Path) -> None:
    likelihood = TextLikelihood(model, texts_of(small_base, folders, TRUE, 3))
    first, again, other = (tune_weights(model, likelihood, budget=9, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.best != other.best


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_items", [1, 2, 9])
def test_noise_never_returns_anything_worse_than_the_start(model: SoupModel, seed: int, num_items: int) -> None:
    """Noise that depends on the weights is an objective like any other: its scores can be computed again."""
    noise = Noise(num_items, seed=seed)
    begun = None if seed % 2 else Profile(weights={"cold": 0.5})
    tuning = tune_weights(model, noise, start=begun, budget=15, seed=seed)

    def overall(weights: Mapping[str, Any]) -> float:
        return float(np.mean([noise.score(ExpertWeights(weights), item, 1) for item in range(num_items)]))

    start = overall({} if begun is None else begun.weights)
    assert tuning.start.overall == pytest.approx(start)
    assert tuning.chosen.overall == pytest.approx(overall(tuning.chosen.weights))
    assert tuning.chosen.overall >= start
    assert tuning.is_better == (overall(tuning.chosen.weights) > start)
    assert tuning.num_search + tuning.num_validation == max(2, num_items)


def test_noise_is_sometimes_better_and_sometimes_not(model: SoupModel) -> None:
    """So the test above has seen both ends of the decision."""
    ends = {tune_weights(model, Noise(9, seed=seed), budget=15, seed=seed).is_better for seed in range(20)}
    assert ends == {True, False}


def test_what_the_search_gains_and_the_validation_loses_is_not_returned(model: SoupModel) -> None:
    """The kept items score the other way round: the better the search, the worse they get."""
    probe = tune_weights(model, Noise(9), budget=5, seed=2)
    assert (probe.num_search, probe.num_validation) == (6, 3)
    kept = np.random.default_rng(2).permutation(9)[:3].tolist()
    tuning = tune_weights(model, Peak(9, {"cold": 1.0}, turned=kept), budget=60, seed=2)
    assert tuning.best is not None
    assert tuning.best.search > tuning.start.search
    assert tuning.best.overall > tuning.start.overall  # six items gain what three lose
    assert tuning.best.validation < tuning.start.validation
    assert not tuning.is_better
    assert tuning.chosen == tuning.start
    assert tuning.profile("ada") is None


def test_what_the_validation_gains_and_all_data_lose_is_not_returned(model: SoupModel) -> None:
    """With draws of its own, the decision may turn everything round that the search has seen."""

    class Turned(Peak):
        def score(self, candidate: ExpertWeights, item: int, draw: int) -> float:
            score = super().score(candidate, item, draw)
            return score if draw == 0 or item in kept else -2 * score

    kept = np.random.default_rng(2).permutation(9)[:3].tolist()
    tuning = tune_weights(model, Turned(9, {"cold": 1.0}), budget=60, seed=2)
    assert tuning.best is not None
    assert tuning.best.validation > tuning.start.validation
    assert tuning.best.overall < tuning.start.overall
    assert tuning.chosen == tuning.start


def test_an_equal_score_returns_the_start(model: SoupModel) -> None:
    class Flat(Noise):
        def score(self, candidate: ExpertWeights, item: int, draw: int) -> float:
            return 1.0

    tuning = tune_weights(model, Flat(6), start=Profile(weights={"warm": 0.3}), budget=12)
    assert not tuning.is_better
    assert tuning.chosen.weights == {"warm": 0.3}


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_scores_that_are_not_numbers_never_win(model: SoupModel, share: float) -> None:
    class Broken(Noise):
        def score(self, candidate: ExpertWeights, item: int, draw: int) -> float:
            is_bad = bool(candidate.weights) and super().score(candidate, 0, 0) < share
            return math.nan if is_bad else -1.0

    tuning = tune_weights(model, Broken(4), budget=14)
    assert not tuning.is_better
    assert tuning.chosen.weights == {}
    assert tuning.chosen.overall == -1.0


def test_the_search_and_the_decision_have_random_numbers_of_their_own(model: SoupModel) -> None:
    noise = Noise(6)
    tune_weights(model, noise, budget=21, population=7)
    assert [(items, draw) for _, items, draw in noise.calls] == [(4, 0), (4, 0), (4, 0), (6, 1)]
    assert [candidates for candidates, _, _ in noise.calls][:-1] == [7, 7, 7]


@pytest.mark.parametrize(("allow", "found"), [(False, {"kind": 0.9}), (True, {"kind": 0.9, "rude": 0.2})])
def test_opposed_sides_have_weights_only_where_they_are_allowed(
    tmp_path: Path, small_base: Path, allow: bool, found: Mapping[str, float]
) -> None:
    for seed, name in enumerate(("kind", "rude")):
        write_record(write_expert(tmp_path / "sides" / name, seed=seed), dimension="style")
    model = open_model(small_base, tmp_path / "sides")
    # without `allow`, the first generation sees that kind gains more than rude, and goes that way
    peak = Peak(3, {"kind": 0.9, "rude": 0.2})
    tuning = tune_weights(model, peak, budget=120, allow_opposed=allow)
    assert tuning.is_better
    assert tuning.chosen.weights == {name: pytest.approx(weight, abs=0.02) for name, weight in found.items()}
    profile = tuning.profile("ada")
    assert profile is not None
    assert profile.allow_opposed == allow
    model.resolve(profile)
    if allow:
        again = tune_weights(model, peak, start=profile, budget=8)
        assert again.allow_opposed


def test_layer_groups_find_weights_that_no_profile_expresses(
    strong: tuple[SoupModel, list[Path]], small_base: Path
) -> None:
    model, _ = strong

    class Halves(Noise):
        """The first group wants 0.8, the second -0.4."""

        def score(self, candidate: ExpertWeights, item: int, draw: int) -> float:
            cold = candidate.weights.get("cold", {})
            assert isinstance(cold, Mapping)
            return -((cold.get("model.layers.0.*", 0.0) - 0.8) ** 2) - (cold.get("model.layers.1.*", 0.0) + 0.4) ** 2

    tuning = tune_weights(model, Halves(3), budget=150, layer_groups=2)
    weights = tuning.chosen.weights["cold"]
    assert isinstance(weights, Mapping)
    assert list(weights) == ["model.layers.0.*", "model.layers.1.*", "*"]
    assert weights["model.layers.0.*"] == pytest.approx(0.8, abs=0.05)
    assert weights["model.layers.1.*"] == weights["*"] == pytest.approx(-0.4, abs=0.05)
    assert tuning.profile("ada") is None
    # what was found is a profile of mixtures
    answers = model.generate("soap", {"cold": weights}, max_new_tokens=4)
    assert answers != model.generate("soap", None, max_new_tokens=4)


def test_a_search_can_be_stopped_between_generations(model: SoupModel) -> None:
    stops = iter([False, True])
    peak = Peak(6, {"cold": 0.5})
    tuning = tune_weights(model, peak, budget=100, population=10, stop=lambda: next(stops))
    assert tuning.is_stopped
    assert tuning.num_evaluations == 10
    assert tuning.is_better  # what was found by then counts
    unstarted = tune_weights(model, peak, budget=100, stop=lambda: True)
    assert (unstarted.num_evaluations, unstarted.best, unstarted.is_better) == (0, None, False)


def test_a_search_ends_when_it_has_converged(model: SoupModel) -> None:
    tuning = tune_weights(model, Peak(3, {}), budget=100_000)
    assert tuning.num_evaluations < 5000
    assert not tuning.is_stopped


def test_a_start_that_is_worse_than_the_base_ends_at_the_base(model: SoupModel) -> None:
    tuning = tune_weights(model, Peak(3, {}), start=Profile(weights={"cold": 0.5}), budget=300)
    assert tuning.is_better
    assert all(abs(weight) < 0.01 for weight in tuning.chosen.weights.values() if isinstance(weight, float))


def _wrong(model: SoupModel, objective: Any = None, **options: Any) -> Tuning:
    return tune_weights(model, objective or Noise(3), **options)


@pytest.mark.parametrize(
    ("options", "what", "where"),
    [
        ({"budget": 0}, "budget is 0", "budget"),
        ({"population": 1}, "population is 1", "population"),
        ({"sigma": -1.0}, "sigma is -1", "sigma"),
        ({"limit": 0.0}, "limit is 0", "limit"),
        ({"layer_groups": 3}, "experts adapt 2 numbered layers", "layer_groups"),
        ({"start": Profile(weights={"cold": 2.0})}, "the start has a weight of magnitude 2, but limit is 1.5", "start"),
        ({"objective": Noise(0)}, "the objective has no items", "objective"),
    ],
)
def test_wrong_arguments_are_told(model: SoupModel, options: dict[str, Any], what: str, where: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        _wrong(model, **options)
    assert caught.value.where == where


def test_an_unknown_expert_in_the_start_is_told(model: SoupModel) -> None:
    with pytest.raises(DeclarationError, match="no expert is called 'hot'"):
        _wrong(model, start=Profile(weights={"hot": 1.0}))


def test_a_model_without_experts_is_told(model: SoupModel) -> None:
    model.unload()
    with pytest.raises(UsageError, match="the model has no experts"):
        _wrong(model)


def test_scores_of_a_wrong_shape_are_told(model: SoupModel) -> None:
    class Total(Noise):
        def scores(self, candidates: Sequence[ExpertWeights], items: Sequence[int], *, draw: int) -> Scores:
            return super().scores(candidates, items, draw=draw)[:, 0]

    with pytest.raises(UsageError, match=r"shape \(7,\) for 7 candidates and 2 items"):
        _wrong(model, Total(3))
