"""The study on simulated users, without a language model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from personalized_soups.declare.persona import Persona
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.studies.elicitation.calibration import calibrate, directions
from personalized_soups.studies.elicitation.merging import declared_profile, mean_rewards, uniform_profile
from personalized_soups.studies.elicitation.page import checks, draw, gain_share, mean_agreement, report, summary
from personalized_soups.studies.elicitation.rows import IMPLICIT, RANDOM, answerer_of, kind_rows, rows_of
from personalized_soups.studies.elicitation.study import COUNTS, ElicitationStudy, SeedResults
from personalized_soups.studies.elicitation.systems import agreement, ask, projected
from personalized_soups.tiny.simulated_users import KINDS, draw_personas
from personalized_soups.users.answers.pairing import scaled_ridge
from tests.studies.elicitation.worlds import CATALOGUE, EXPERTS, SIDES, make_world

RULE = SideRule({name: dimension for name, (dimension, _) in SIDES.items()})


def test_exact_rewards_of_the_scores_predict_every_preference() -> None:
    """Without noise, the experts' rewards span the users' rewards, so the only error is in the estimate."""
    world = make_world(noise=0.0)
    personas = draw_personas("exact", 6, world.rewards.dimensions, seed=0)
    rows, omitted = rows_of(world, personas, num_known=20, per_known=20, seed=0, systems=("PReF basis",))
    assert set(rows) == {IMPLICIT, RANDOM, "implicit rewards, active, no known users", "PReF basis"}
    assert {"P-RLHF", "CMA-ES", "LoRe", "VPL", "PAL"} == set(omitted)
    for name in (IMPLICIT, RANDOM):
        shares = [
            agreement(world, row[40].held, world.rewards.of(persona, world.items))
            for row, persona in zip(rows[name], personas, strict=True)
        ]
        assert np.mean(shares) > 0.93, name
    assert all(set(row) == set(COUNTS) for row in rows[RANDOM])


def test_agreement_counts_pairs_of_one_prompt_with_different_true_rewards() -> None:
    world = make_world()
    truth = world.rewards.of(Persona(weights={"style": 1.0}), world.items)
    assert agreement(world, truth, truth) == 1.0
    assert agreement(world, -truth, truth) == 0.0
    assert agreement(world, np.zeros(len(truth)), truth) == 0.5
    # the oracle, with a loop over all pairs of answers
    guess = np.random.default_rng(0).normal(size=len(truth))
    right = [
        np.sign(guess[i] - guess[j]) == np.sign(truth[i] - truth[j])
        for i in range(len(truth))
        for j in range(i)
        if world.items[i].prompt == world.items[j].prompt and abs(truth[i] - truth[j]) > 1e-9
    ]
    assert agreement(world, guess, truth) == pytest.approx(np.mean(right))


def test_questions_are_answered_by_the_persona_and_never_twice() -> None:
    world = make_world()
    persona = draw_personas("exact", 1, world.rewards.dimensions, seed=2)[0]
    answerer = answerer_of(world, persona)
    rng = np.random.default_rng(0)
    asked, labels, estimates = ask(
        answerer, world.pool.differences, world.pool.prior, world.pool.prompts, rule="prediction", rng=rng
    )
    assert len(set(asked)) == len(asked) == COUNTS[-1]
    margins = world.question_scores @ world.rewards.weights(persona)
    assert labels == [(1 + np.sign(margins[index])) / 2 for index in asked]
    assert set(estimates) == set(COUNTS)
    assert estimates[5].num_answers == 5


def test_a_predicted_reward_that_experts_can_express_is_projected_onto_it() -> None:
    world = make_world()
    weights = np.array([0.3, 0.0, 0.8, 1.0, 0.0, -0.2])
    margins = world.pool.differences @ weights
    found = world.pool.differences @ projected(world, margins).mean
    # The ridge is 1e-3 of the mean eigenvalue, which shrinks the weak directions of opposite sides.
    assert np.corrcoef(found, margins)[0, 1] > 0.999


def test_intervals_of_drawn_logistic_users_hold_the_truth() -> None:
    """With the margins of a pool's prior, and as often as they say."""
    pool = make_world().pool
    pool = pool.with_prior(scaled_ridge(pool.differences))
    found = calibrate(pool, RULE, rule="random", num_users=120, seed=0)
    for count in ("2", "5", "10", "20"):
        # 360 intervals: 4 standard errors of the share 0.9
        assert abs(found["inside"][count] - 0.9) < 4 * np.sqrt(0.09 / 360)
        # the expected agreement, by which sessions stop, is that of the users
        assert abs(found["expected"][count] - found["agreement"][count]) < 0.03
    assert found["width"]["20"] < found["width"]["5"] < found["width"]["2"] < 1
    assert found["error"]["20"] < found["error"]["2"] < 1.1


def test_the_directions_are_differences_of_the_sides() -> None:
    axes = directions(EXPERTS, RULE)
    assert axes.tolist() == [[1, 0, 0, 0, -1, 0], [0, 1, -1, 0, 0, 0], [0, 0, 0, 1, 0, -1]]


def test_declared_weights_become_the_preferred_sides() -> None:
    profile = declared_profile(Persona(weights={"friendly": -1.0, "informativeness": 0.5}), CATALOGUE)
    assert profile.weights == {"unfriendly": 0.6, "informative": 0.3}
    assert sum(uniform_profile(EXPERTS).weights.values()) == pytest.approx(1.0)


def test_the_rewards_of_soups_are_each_users_own() -> None:
    world = make_world()
    warm, cold = Persona(weights={"friendly": 1.0}), Persona(weights={"unfriendly": 1.0})
    prompts = [world.items[0].prompt, world.items[4].prompt]
    answers = {0: [world.items[0].answer, world.items[4].answer], 1: [world.items[5].answer]}
    means = mean_rewards(world.rewards, [warm, cold], prompts, [(0, 1), (1,)], answers)
    scores = world.rewards.of(warm, world.items)
    assert means.tolist() == pytest.approx([(scores[0] + scores[4]) / 2, -scores[5]])


def test_other_kinds_of_users_are_compared_with_their_own_rewards() -> None:
    found = kind_rows(make_world(), num_users=4, num_known=12, per_known=20, seed=0)
    assert set(found) == set(KINDS) - {"exact"}
    # These users change after 10 answers. Until they have answered again, the answers tell of their old taste.
    assert found["changing"]["10"] < found["changing"]["5"] - 0.1


def results(seed: int, *, active: float, random: float, soup: float) -> SeedResults:
    return {
        "seed": seed,
        "agreement": {
            IMPLICIT: {str(count): [active, active + 0.02] for count in COUNTS},
            RANDOM: {str(count): [random, random + 0.01] for count in COUNTS},
        },
        "kinds": {"noisy": {str(count): 0.8 for count in COUNTS}},
        "rewards": {
            "base": {"0": [0.0, -0.5]},
            "uniform soup": {"0": [0.1, -0.5]},
            "declared weights": {"0": [1.0, 0.5]},
            IMPLICIT: {str(count): [soup, soup - 0.5] for count in COUNTS},
            RANDOM: {"10": [0.4, 0.0]},
        },
        "calibration": {
            "inside": {str(count): 0.9 for count in COUNTS},
            "width": {str(count): 0.5 for count in COUNTS},
            "expected": {str(count): 0.8 for count in COUNTS},
            "agreement": {str(count): 0.8 for count in COUNTS},
            "error": {str(count): 0.5 for count in COUNTS},
        },
        "omitted": {"PAL": "this run left it out"},
    }


def test_shares_of_gains_and_targets_are_means_over_seeds_and_users(tmp_path: Path) -> None:
    seeds = [results(0, active=0.85, random=0.7, soup=0.9), results(1, active=0.89, random=0.7, soup=0.7)]
    assert mean_agreement(seeds, IMPLICIT, 10) == pytest.approx(0.88)
    # gains: declared (1 + 1) twice, active (.9 + .9) and (.7 + .7)
    assert gain_share(seeds, IMPLICIT, 10) == pytest.approx(0.8)
    assert gain_share(seeds, "uniform soup", 0) == pytest.approx(0.2 / 4)
    by_name = {check["name"]: check for check in checks(seeds)}
    assert [check["met"] for check in by_name.values()] == [True, True, False, True, True]
    study = ElicitationStudy(num_seeds=2)
    page = report(study, seeds, picture="elicitation.png")
    assert "0.880" in page
    assert "**no**" in page
    assert "- PAL: this run left it out." in page
    assert draw(seeds, tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(json.dumps(summary(study, seeds), allow_nan=False))["gain_share"][IMPLICIT][
        "10"
    ] == pytest.approx(0.8)
