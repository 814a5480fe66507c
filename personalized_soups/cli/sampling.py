"""The sampling options that several commands share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from personalized_soups.errors import UsageError


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """Options for sampling answers.

    Attributes:
        max_new_tokens: maximum length of an answer, in tokens.
        temperature: sampling temperature. With 0, the likeliest token is always chosen.
        seed: random seed.
        batch_size: number of answers generated at once.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    batch_size: int


def check_temperature(temperature: float, *, usual: float = 0.7) -> None:
    """Raise UsageError if the temperature is infinite. typer already rejects NaN and negative numbers.

    Args:
        temperature: the value of --temperature.
        usual: the temperature that the error suggests.

    Raises:
        UsageError: if the temperature is infinite.
    """
    if math.isinf(temperature):
        raise UsageError(
            "the temperature is infinite, but it must be a finite number",
            where="--temperature",
            mend=f"give a finite number, e.g. --temperature {usual}",
        )
