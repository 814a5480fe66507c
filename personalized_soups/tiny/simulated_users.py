"""Simulated users, who answer questions by the scorers of a catalogue. Their preferences are known.

Shapes: U = users, M = answers to prompts, D = dimensions and validity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.evidence import Choice, Question
from personalized_soups.declare.persona import Change, Persona
from personalized_soups.errors import DeclarationError
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.scorer_rewards import ScorerRewards
from personalized_soups.scoring.scorers import Scorer

Floats = npt.NDArray[np.float64]

Kind: TypeAlias = Literal["exact", "logistic", "noisy", "changing", "outside"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TEMPERATURE = 0.5  # of logistic users; a user with the weight 1 prefers one end to the other with odds of e^4
_NOISE = 0.15  # the share of a noisy user's answers that are wrong
_CHANGE_AFTER = 10


class PersonaRewards:
    """The rewards of answers for personas, from scores that are computed once.

    Args:
        catalogue: the catalogue that declares the dimensions and their scorers.
        scorers: functions that replace scorers of the catalogue, by the name of a dimension or side.
    """

    def __init__(self, catalogue: Catalogue, *, scorers: Mapping[str, Scorer] | None = None) -> None:
        self.catalogue = catalogue
        self._scores = ScorerRewards(catalogue, scorers=scorers)
        self._known: dict[TextItem, Floats] = {}

    @cached_property
    def dimensions(self) -> tuple[str, ...]:
        """The names of the dimensions that have a scorer."""
        return self._scores.names[:-1]

    def features(self, items: Sequence[TextItem], /) -> Floats:
        """Return [M, D]: the score of each answer from -1 to 1 in each dimension, and 0 or -1 if it is invalid.

        An invalid answer has the score 0 in every dimension.
        """
        new = [item for item in dict.fromkeys(items) if item not in self._known]
        if new:
            scores = self._scores.features(new)
            valid = scores[:, -1:]
            rows = np.concatenate([(2 * scores[:, :-1] - 1) * valid, valid - 1], axis=1)
            self._known.update(zip(new, rows, strict=True))
        if not items:
            return np.zeros((0, len(self._scores.names)))
        return np.stack([self._known[item] for item in items])

    def weights(self, persona: Persona, *, num_answers: int = 0) -> Floats:
        """Return [D]: a persona's weight of each dimension, and what an invalid answer costs.

        Raises:
            DeclarationError: if a weight names no dimension or side of the catalogue, or a dimension without a scorer.
        """
        by_dimension = persona.by_dimension(self.catalogue, num_answers=num_answers)
        for name in by_dimension:
            if name not in self.dimensions:
                raise DeclarationError(
                    f"the persona weighs the dimension {name!r}, which has no scorer",
                    where=persona.place("weights"),
                    mend=f"give the dimension a scorer: {self.catalogue.place('dimensions', name)}",
                )
        return np.array([*(by_dimension.get(name, 0.0) for name in self.dimensions), persona.invalid])

    def of(self, persona: Persona, items: Sequence[TextItem], *, num_answers: int = 0) -> Floats:
        """Return [M]: the reward of each answer for a persona, after the persona has answered some questions."""
        features = self.features(items)
        rewards: Floats = features @ self.weights(persona, num_answers=num_answers)
        for phrase, weight in persona.phrases.items():
            # an invalid answer gets no reward for its phrases: otherwise, endless commas would be the best answer
            counts = np.array([item.answer.count(phrase) for item in items], dtype=np.float64)
            rewards = rewards + weight * counts * (features[:, -1] == 0)
        return rewards


@dataclass(frozen=True, slots=True)
class SimulatedUser:
    """A persona who answers questions. Equal questions get equal answers, in whatever order they are asked.

    Attributes:
        persona: the preferences.
        rewards: the rewards of answers.

    Example:
        >>> catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
        >>> user = SimulatedUser(Persona(weights={"concise": 1.0}), PersonaRewards(catalogue))
        >>> question = Question(id="q1", prompt="How do I clean a lamp?", a="Dust it.", b="Dust it. " * 60)
        >>> user.choice(question)
        'a'
    """

    persona: Persona
    rewards: PersonaRewards

    def choice(self, question: Question, *, num_answers: int = 0) -> Choice:
        """Return the answer to a question, after `num_answers` earlier answers."""
        items = [TextItem(question.prompt, question.a), TextItem(question.prompt, question.b)]
        first, second = self.rewards.of(self.persona, items, num_answers=num_answers)
        return choose(self.persona, float(first - second), question.id)

    def prefers(self, items: Sequence[tuple[TextItem, TextItem]], *, num_answers: int = 0) -> Floats:
        """Return [N]: 1 if the first answer of a pair has more reward, 0 if the second has more, 0.5 if none has."""
        first = self.rewards.of(self.persona, [a for a, _ in items], num_answers=num_answers)
        second = self.rewards.of(self.persona, [b for _, b in items], num_answers=num_answers)
        return (1 + np.sign(first - second)) / 2


def choose(persona: Persona, margin: float, question: str) -> Choice:
    """Return the choice of a persona for whom `a` has `margin` more reward than `b`.

    The random numbers depend on the persona's name and seed and on the id of the question.
    """
    seed = blake3(f"{persona.seed}\0{persona.name}\0{question}".encode()).digest(length=8)
    skip, logistic, flip = np.random.default_rng(int.from_bytes(seed, "little")).random(3)
    if skip < persona.skips:
        return "skip"
    if abs(margin) <= persona.ties_within:
        return "tie"
    if persona.temperature == 0:
        is_first = margin > 0
    else:
        # a logistic random number is above -margin / temperature with the probability sigmoid(margin / temperature)
        is_first = float(np.log(logistic / (1 - logistic))) < margin / persona.temperature
    if flip < persona.noise:
        is_first = not is_first
    return "a" if is_first else "b"


def draw_personas(kind: Kind, count: int, dimensions: Sequence[str], *, seed: int) -> list[Persona]:
    """Return `count` personas of one kind, with weights from a normal distribution.

    - `exact`: always choose the answer with more reward;
    - `logistic`: choose with a known temperature;
    - `noisy`: choose the other answer with a known probability;
    - `changing`: have new weights after some answers;
    - `outside`: like commas, which no dimension measures.

    Args:
        kind: the kind.
        count: the number of personas.
        dimensions: the names of the dimensions.
        seed: the seed. A persona depends on the seed and on its place, but not on `count`.
    """
    personas = []
    for at in range(count):
        rng = np.random.default_rng([seed, KINDS.index(kind), at])
        weights = _weights(dimensions, rng)
        later = _weights(dimensions, rng)
        personas.append(
            Persona(
                name=f"{kind}-{at}",
                weights={} if kind == "outside" else weights,
                phrases={",": 1.0 if rng.random() < 0.5 else -1.0} if kind == "outside" else {},
                temperature=_TEMPERATURE if kind == "logistic" else 0.0,
                noise=_NOISE if kind == "noisy" else 0.0,
                change=Change(after=_CHANGE_AFTER, weights=later) if kind == "changing" else None,
                seed=seed,
            )
        )
    return personas


def logistic_labels(
    weights_UD: Floats, differences_QD: Floats, rng: np.random.Generator, *, temperature: float = 1.0
) -> Floats:
    """Return [U, Q], 1 for `a` and 0 for `b`: answers of users whose weights are over given base rewards.

    Args:
        weights_UD: the weights of each user.
        differences_QD: `phi(a) - phi(b)` of each question.
        rng: the generator of random numbers.
        temperature: a user chooses `a` with probability `sigmoid(w . v / temperature)`. With 0, users do not err; a
            margin of 0 gives `b`.
    """
    margins = weights_UD @ differences_QD.T
    if temperature == 0:
        return (margins > 0).astype(np.float64)
    return (rng.logistic(size=margins.shape) < margins / temperature).astype(np.float64)


def _weights(dimensions: Sequence[str], rng: np.random.Generator) -> dict[str, float]:
    return {
        name: round(float(weight), 4) for name, weight in zip(dimensions, rng.normal(size=len(dimensions)), strict=True)
    }
