"""The preference pairs of the study, and the dimensions of its experts.

An expert of a trait learns to answer the trait's statements as a person with the trait does. A small model learns more
than that: an expert for extraversion also agrees with every other cheerful statement. So each expert also sees
statements of the other traits as ties: the same statement twice, once with Yes and once with No as the better answer.
The loss of such a pair of pairs, `-log sigmoid(beta d) - log sigmoid(-beta d)`, is least at `d = 0`: there the expert
answers as the base does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from personalized_soups.declare.dimension import Catalogue, Dimension, Side
from personalized_soups.studies.persona.combinations import Combination, expert_name
from personalized_soups.studies.persona.statements import Statement, TraitSplit
from personalized_soups.training.data import Pair, write_pairs


def catalogue(traits: Sequence[str]) -> Catalogue:
    """Return the dimensions of the study: each trait with its opposite."""
    return Catalogue(
        dimensions={
            trait: Dimension(
                about=f"Whether a person has the trait {trait}.",
                sides={
                    expert_name(trait, has_trait=True): Side(instruction=f"You have the trait {trait}.", end="high"),
                    expert_name(trait, has_trait=False): Side(
                        instruction=f"You have the opposite of the trait {trait}.", end="low"
                    ),
                },
            )
            for trait in traits
        }
    )


def trait_pairs(statements: Sequence[Statement], *, has_trait: bool) -> list[Pair]:
    """Return a pair for each statement. The chosen answer is that of a person with the trait, or with its opposite."""
    return [_pair(statement, statement.answer(has_trait=has_trait)) for statement in statements]


def tie_pairs(statements: Sequence[Statement]) -> list[Pair]:
    """Return two pairs for each statement, next to each other: one prefers Yes, the other prefers No."""
    return [_pair(statement, answer) for statement in statements for answer in ("Yes", "No")]


def expert_pairs(splits: Mapping[str, TraitSplit], trait: str, *, has_trait: bool, num_ties: int) -> list[Pair]:
    """Return the pairs of one expert: those of its own trait, and the ties of the other traits.

    Args:
        splits: the statements of every trait.
        trait: the expert's trait.
        has_trait: whether the expert is that of the trait or of its opposite.
        num_ties: the number of statements of all other traits together.
    """
    others = [split.train for name, split in splits.items() if name != trait]
    mixed = [statement for row in zip_longest(*others) for statement in row if statement is not None]
    return trait_pairs(splits[trait].train, has_trait=has_trait) + tie_pairs(mixed[:num_ties])


def joint_pairs(splits: Mapping[str, TraitSplit], combination: Combination) -> list[Pair]:
    """Return the pairs of one adapter that is trained on all sides of a combination."""
    return [
        pair
        for trait, sign in zip(combination.traits, combination.signs, strict=True)
        for pair in trait_pairs(splits[trait].train, has_trait=sign)
    ]


def write_once(path: Path, pairs: Sequence[Pair]) -> Path:
    """Write the pairs, unless an earlier run has written them, and return the path."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pairs(path, pairs)
    return path


def _pair(statement: Statement, chosen: str) -> Pair:
    rejected = "No" if chosen == "Yes" else "Yes"

    def said(role: str, content: str) -> list[dict[str, Any]]:
        return [{"role": role, "content": content}]

    return {
        "prompt": statement.prompt,
        "chosen": said("assistant", chosen),
        "rejected": said("assistant", rejected),
    }
