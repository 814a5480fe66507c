"""The rows of the study: the systems that guess a user's reward from answers.

Shapes: U = users, K = dimensions and validity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from personalized_soups.declare.evidence import Question
from personalized_soups.declare.persona import Persona
from personalized_soups.studies.elicitation.systems import (
    COUNTS,
    Answerer,
    Guess,
    agreement,
    fitted_prior,
    implicit_guesses,
    known_comparisons,
    model_guesses,
)
from personalized_soups.studies.elicitation.world import Floats, World
from personalized_soups.systems.lore.training import LoreSettings, train_lore
from personalized_soups.systems.pal.training import PalSettings, train_pal
from personalized_soups.systems.pref.training import PrefSettings, train_pref
from personalized_soups.systems.preference_models import Comparisons, PreferenceModel
from personalized_soups.systems.vpl.training import VplSettings, train_vpl
from personalized_soups.tiny.simulated_users import KINDS, SimulatedUser, draw_personas
from personalized_soups.users.answers.prior import GaussianPrior
from personalized_soups.users.answers.selection import Rule

# The guesses of one system: for each user, by the number of answers.
Row: TypeAlias = list[dict[int, Guess]]

IMPLICIT, RANDOM, RIDGE = (
    "implicit rewards, active",
    "implicit rewards, random",
    "implicit rewards, active, no known users",
)
# How the questions of a row are chosen.
RULES: dict[str, Rule] = {IMPLICIT: "prediction", RANDOM: "random", RIDGE: "prediction"}
# The numbers of answers after which a row's soups answer the held-out prompts.
MERGED: dict[str, tuple[int, ...]] = {
    IMPLICIT: COUNTS,
    RANDOM: (10,),
    **dict.fromkeys(("PReF basis", "LoRe", "VPL", "PAL"), (10,)),
}
_RANK = 4  # base rewards of PReF and LoRe: three dimensions, and validity

# Trains a system on the comparisons of known users with a seed.
Trainer: TypeAlias = Callable[[Comparisons, int], PreferenceModel]
SYSTEMS: Mapping[str, Trainer] = MappingProxyType(
    {
        "PReF basis": lambda known, seed: train_pref(known, PrefSettings(rank=_RANK, seed=seed)),
        "LoRe": lambda known, seed: train_lore(known, LoreSettings(rank=2 * _RANK, seed=seed)),
        "VPL": lambda known, seed: train_vpl(known, VplSettings(seed=seed)),
        "PAL": lambda known, seed: train_pal(known, PalSettings(num_prototypes=_RANK, seed=seed)),
    }
)
_OMITTED = {
    "P-RLHF": "it learns users while the language model trains, so each number of answers needs a training",
    "CMA-ES": "each user and number of answers needs a search with hundreds of forward passes",
}


def answerer_of(world: World, persona: Persona) -> Answerer:
    """Return the function that answers the questions of the pool as a persona does. Skipped questions count as ties."""
    user = SimulatedUser(persona, world.rewards)
    values = {"a": 1.0, "b": 0.0, "tie": 0.5, "skip": 0.5}
    questions: tuple[Question, ...] = world.pool.questions
    return lambda index, num_answers: values[user.choice(questions[index], num_answers=num_answers)]


def known_weights(world: World, count: int, *, seed: int) -> Floats:
    """Return [U, K]: the weights of known users, who are other users than those who are asked."""
    personas = draw_personas("exact", count, world.rewards.dimensions, seed=seed + 1_000_000)
    return np.stack([world.rewards.weights(persona) for persona in personas])


def rows_of(
    world: World,
    personas: Sequence[Persona],
    *,
    num_known: int,
    per_known: int,
    seed: int,
    systems: Sequence[str] = tuple(SYSTEMS),
    on_done: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Row], dict[str, str]]:
    """Return the guesses of each system for each persona, and the reasons why systems are omitted."""
    known = known_weights(world, num_known, seed=seed)
    rng = np.random.default_rng([seed, 2])
    fitted = fitted_prior(world, known, per_user=per_known, rng=rng)
    comparisons = known_comparisons(world, known, per_user=per_known, rng=rng)
    models = {name: SYSTEMS[name](comparisons, seed) for name in systems}
    priors: dict[str, GaussianPrior] = {IMPLICIT: fitted, RANDOM: fitted, RIDGE: world.pool.prior}
    rows: dict[str, Row] = {name: [] for name in (*RULES, *models)}
    for user, persona in enumerate(personas):
        answerer = answerer_of(world, persona)
        for name, rule in RULES.items():
            guesses, asked, labels = implicit_guesses(world, answerer, priors[name], rule=rule, seed=[seed, 3, user])
            rows[name].append(guesses)
            if name == RANDOM:
                for system, model in models.items():
                    rows[system].append(model_guesses(world, model, asked, labels))
        on_done(user + 1)
    return rows, {**_OMITTED, **{name: "this run left it out" for name in SYSTEMS if name not in systems}}


def kind_rows(
    world: World, *, num_users: int, num_known: int, per_known: int, seed: int
) -> dict[str, dict[str, float]]:
    """Return the mean agreement of the row IMPLICIT for each kind of users, by the number of answers.

    A user who changes is compared with the weights that the user has after the answers.
    """
    known = known_weights(world, num_known, seed=seed)
    prior = fitted_prior(world, known, per_user=per_known, rng=np.random.default_rng([seed, 2]))
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        if kind == "exact":
            continue
        totals = dict.fromkeys(COUNTS, 0.0)
        for user, persona in enumerate(draw_personas(kind, num_users, world.rewards.dimensions, seed=seed)):
            answerer = answerer_of(world, persona)
            guesses, _, _ = implicit_guesses(world, answerer, prior, rule="prediction", seed=[seed, 4, user])
            for count in COUNTS:
                truth = world.rewards.of(persona, world.items, num_answers=count)
                totals[count] += agreement(world, guesses[count].held, truth) / num_users
        found[kind] = {str(count): total for count, total in totals.items()}
    return found
