"""How the commands sample answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from personalized_soups.errors import UsageError


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How answers are sampled.

    Attributes:
        max_new_tokens: longest answer, in tokens.
        temperature: sampling temperature; 0 always takes the likeliest token.
        seed: random seed.
        batch_size: answers generated at once.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    batch_size: int


def check_temperature(temperature: float, *, usual: float = 0.7) -> None:
    """Raise if a temperature is infinite; typer rejects NaN and negative numbers.

    Args:
        temperature: the value of --temperature.
        usual: the temperature that the error suggests.

    Raises:
        UsageError: naming the option.
    """
    if math.isinf(temperature):
        raise UsageError(
            "the temperature is infinite, but it must be a finite number",
            where="--temperature",
            mend=f"give a finite number, e.g. --temperature {usual}",
        )
