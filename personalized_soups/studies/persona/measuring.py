"""Measure the margins of statements: log p(Yes) - log p(No), with the sign of the answer of a person with the trait.

Margins are stored by the name of the model, so that an interrupted run measures each model once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from personalized_soups.declare.profile import Profile
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.choices import choice_log_probs
from personalized_soups.scoring.margin_forecast import Floats
from personalized_soups.studies.folder import write_text
from personalized_soups.studies.persona.statements import Statement

# A model's margins of the statements of each trait, [N], float64.
Margins = dict[str, Floats]

_BATCH_ROWS = 50

# The name that an adapter has in a model while it is measured.
_ADAPTER = "measured-adapter"


class MarginStore:
    """The margins that were measured with one seed, each in a file of its own.

    Args:
        folder: the folder of the files.
        statements: for each trait, the statements that are measured. They are the same for all models.
    """

    def __init__(self, folder: Path, statements: Mapping[str, Sequence[Statement]]) -> None:
        self._folder = folder
        self.statements = statements

    def has(self, name: str) -> bool:
        """Return whether the margins of a model are stored."""
        return self._path(name).is_file()

    def put(self, name: str, margins: Mapping[str, Floats], probability: float) -> None:
        """Store the margins of a model, and the mean probability of Yes or No."""
        content = {
            "probability": probability,
            "margins": {trait: [round(float(value), 6) for value in values] for trait, values in margins.items()},
        }
        write_text(self._path(name), json.dumps(content) + "\n")

    def margins(self, name: str) -> Margins:
        """Return the stored margins of a model: positive if a statement is answered as a person with the trait does.

        Raises:
            FileNotFoundError: if they are not stored.
        """
        content = json.loads(self._path(name).read_text(encoding="utf-8"))
        return {trait: np.array(values) for trait, values in content["margins"].items()}

    def probability(self, name: str) -> float:
        """Return the mean probability that an answer of the model begins with Yes or No."""
        return float(json.loads(self._path(name).read_text(encoding="utf-8"))["probability"])

    def measure(self, model: SoupModel, name: str, profile: Mapping[str, float] | None) -> None:
        """Measure and store the margins of a model with a profile, unless they are stored.

        All statements are prompts of one list, so the tokens that they share are computed once.
        """
        if self.has(name):
            return
        statements = [one for listed in self.statements.values() for one in listed]
        table = choice_log_probs(
            model,
            [statement.prompt for statement in statements],
            ["Yes", "No"],
            # Fitted weights may be on both sides of a trait.
            None if profile is None else Profile(user="measured", weights=dict(profile), allow_opposed=True),
            batch_size=_BATCH_ROWS,
        )
        signs = np.array([1.0 if statement.agrees else -1.0 for statement in statements])
        margins = signs * (table[:, 0] - table[:, 1])
        ends = np.cumsum([len(listed) for listed in self.statements.values()])
        parts = np.split(margins, ends[:-1])
        self.put(name, dict(zip(self.statements, parts, strict=True)), float(np.exp(table).sum(1).mean()))

    def measure_adapter(self, model: SoupModel, name: str, folder: Path) -> None:
        """Measure and store the margins of the base with one adapter, which is an expert of the model meanwhile."""
        model.experts.add(folder, _ADAPTER)
        try:
            self.measure(model, name, {_ADAPTER: 1.0})
        finally:
            model.experts.remove(_ADAPTER)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"
