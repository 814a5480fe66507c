"""The settings of the study, and the names of the soups that it compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import library_versions
from personalized_soups.declare.loader import load
from personalized_soups.declare.profile import MethodName
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import UsageError
from personalized_soups.studies.persona.combinations import Combination, combinations

THIRD = "linear 1/3"
CHOSEN = "linear chosen"
PAPER = "factor_average 1/3"
FACTORS = "factor_average chosen"
FITTED = "linear fitted"
SIGNED = "linear fitted, one expert a trait"
JOINT = "one adapter for the combination"
SYSTEMS = (THIRD, CHOSEN, PAPER, FACTORS, FITTED, SIGNED)

FACTOR_SCALES = (1 / 3, 0.6, 1.0)


@dataclass(frozen=True, slots=True)
class PersonaStudy:
    """The settings of the study.

    Attributes:
        traits: the traits. Each has two experts.
        triples: groups of three traits whose sides are combined. Seeds after the first use the first group only.
        num_seeds: the number of seeds, each with a split and experts of its own.
        num_train, num_validation, num_test: the number of statements of each trait in each part.
        num_ties: the number of other traits' statements that an expert learns to answer as the base does.
        num_joint: the number of combinations of the first group for which one adapter is trained on all sides.
        more_methods: further merge methods, measured at the chosen weight with the first seed and group.
        base: the base model: a name, a folder or a hub id.
        training: the training recipe.
        device: `auto`, `cpu` or `cuda`.
        num_workers: the number of processes that train experts.
    """

    traits: tuple[str, ...] = ("extraversion", "interest-in-art", "risk-averse", "neuroticism")
    triples: tuple[tuple[str, ...], ...] = (
        ("extraversion", "interest-in-art", "risk-averse"),
        ("interest-in-art", "risk-averse", "neuroticism"),
    )
    num_seeds: int = 3
    num_train: int = 256
    num_validation: int = 100
    num_test: int = 100
    num_ties: int = 192
    num_joint: int = 4
    more_methods: tuple[MethodName, ...] = ("ties", "knots")
    base: str = "smollm2"
    training: TrainingRecipe = field(default_factory=lambda: load(shipped_recipe("train/persona.yaml"), TrainingRecipe))
    device: str = "auto"
    num_workers: int = 1

    def __post_init__(self) -> None:
        for name in ("num_train", "num_validation", "num_test"):
            if getattr(self, name) % 2:
                raise UsageError(
                    f"{name} is {getattr(self, name)}, but half of the statements are answered Yes",
                    where=name,
                    mend="give an even number",
                )
        unknown = sorted({trait for triple in self.triples for trait in triple} - set(self.traits))
        if unknown:
            raise UsageError(
                f"a group names traits without experts: {', '.join(unknown)}",
                where="triples",
                mend="name these traits in `traits` as well",
            )

    def traits_of(self, seed: int) -> tuple[str, ...]:
        """Return the traits whose experts a seed trains."""
        return self.traits if seed == 0 else self.triples[0]

    def triples_of(self, seed: int) -> tuple[tuple[str, ...], ...]:
        """Return the groups whose combinations a seed measures."""
        return self.triples if seed == 0 else self.triples[:1]

    def joint_of(self, seed: int) -> list[Combination]:
        """Return the combinations for which a seed trains one adapter: the first seed only."""
        return combinations(self.triples[0])[: self.num_joint] if seed == 0 else []

    def systems_of(self, seed: int, triple: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names of the soups that are measured for a group."""
        more = self.more_methods if seed == 0 and triple == self.triples[0] else ()
        return (*SYSTEMS, *more)

    def settings(self, data: Path) -> dict[str, object]:
        """Return the settings that a resumed run must have in common with the interrupted run."""
        return {
            "study": "persona",
            "traits": self.traits,
            "triples": self.triples,
            "num_train": self.num_train,
            "num_validation": self.num_validation,
            "num_test": self.num_test,
            "num_ties": self.num_ties,
            "base": base_fingerprint(self.base),
            "training": self.training.model_dump(mode="json"),
            "data": {
                trait: blake3((data / f"{trait}.jsonl").read_bytes()).hexdigest(length=16) for trait in self.traits
            },
            "versions": library_versions("torch", "transformers", "peft", "trl"),
        }
