"""Sample some answers of a pool under the instructions of sides (context distillation).

An answer that is sampled under an instruction follows it better than a plain one. Its pair keeps the plain prompt, so
the expert learns to answer so without the instruction (Askell et al. 2021, arXiv:2112.00861, section 2.1).
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

from personalized_soups.declare.dimension import Catalogue

# An answer repeats an instruction if it has this many of its words in a row.
_REPEATED_WORDS = 3
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class InstructedShare:
    """How many answers to each prompt are sampled under an instruction, and under which.

    The instructions are dealt to the prompts in turn, so each is used equally often. Neighbours in the list are dealt
    to one prompt, so that a prompt gets answers of opposite sides. Which prompt of a round gets which is drawn by
    chance, so that it does not depend on the kind of the prompt.

    Args:
        count: the number of answers to a prompt that are sampled under an instruction.
        instructions: the instructions, those of one dimension next to each other.

    Raises:
        ValueError: if `count` is negative, or there are no instructions for it.

    Example:
        >>> InstructedShare(2, ("Be warm.", "Be cold.")).of_prompt(0, num_samples=3)
        (None, 'Be warm.', 'Be cold.')
    """

    count: int
    instructions: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.count < 0 or (self.count and not self.instructions):
            raise ValueError(f"count is {self.count}, with {len(self.instructions)} instructions")

    def of_prompt(self, index: int, *, num_samples: int) -> tuple[str | None, ...]:
        """Return the instruction of each of the `num_samples` answers to prompt number `index`. None is a plain answer.

        Raises:
            ValueError: if `count` is greater than `num_samples`.
        """
        if self.count > num_samples:
            raise ValueError(f"{self.count} of {num_samples} answers cannot be instructed")
        plain: tuple[str | None, ...] = (None,) * (num_samples - self.count)
        if not self.count:
            return plain
        number = len(self.instructions)
        per_round = number // math.gcd(self.count, number)  # the prompts in which each instruction occurs equally often
        order = list(range(per_round))
        random.Random(f"instructions/{index // per_round}").shuffle(order)
        first = order[index % per_round] * self.count
        return (*plain, *(self.instructions[(first + turn) % number] for turn in range(self.count)))


def instructions_of(catalogue: Catalogue, side: str | None = None) -> tuple[str, ...]:
    """Return the instructions of all sides of a catalogue, or of the sides of one side's dimension.

    Raises:
        DeclarationError: if no side is called `side`.
    """
    dimensions = [catalogue.dimensions[catalogue.side(side)[0]]] if side is not None else catalogue.dimensions.values()
    return tuple(declared.instruction for dimension in dimensions for declared in dimension.sides.values())


def repeats(answer: str, instruction: str) -> bool:
    """Return whether the answer has three words of the instruction in a row, whatever their case and punctuation.

    Small models often speak of an instruction instead of following it.

    Example:
        >>> repeats("The cold, curt and impatient way.", "Answer in a cold, curt and impatient way.")
        True
        >>> repeats("Ask someone else.", "Answer in a cold, curt and impatient way.")
        False
    """
    asked, said = (_WORD.findall(text.lower()) for text in (instruction, answer))
    runs = {tuple(asked[at : at + _REPEATED_WORDS]) for at in range(len(asked) - _REPEATED_WORDS + 1)}
    return any(tuple(said[at : at + _REPEATED_WORDS]) in runs for at in range(len(said) - _REPEATED_WORDS + 1))
