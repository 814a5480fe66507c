"""`FluencyBounds`: the bounds within which an answer is fluent. `psoups scorer calibrate` writes them."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from personalized_soups.declare.declared import Declared

NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class FluencyBounds(Declared):
    """The bounds of a fluency gate, calibrated on a base's own answers.

    An answer of n tokens is fluent if their mean log-probability under the base is at least
    `typical - max_deviations * sqrt(between_texts^2 + between_tokens^2 / n)`. The mean of a short answer varies more,
    so it may be lower.

    Example:
        >>> bounds = FluencyBounds(typical=-1.5, between_texts=0.3, between_tokens=2.0, max_deviations=2.0)
        >>> round(bounds.least_log_prob(100), 3), round(bounds.least_log_prob(4), 3)
        (-2.221, -3.588)
    """

    typical: float = Field(description="The mean log-probability of a token, averaged over the base's own answers.")
    between_texts: NotNegative = Field(description="The standard deviation of this mean between answers.")
    between_tokens: NotNegative = Field(description="The standard deviation of a token's log-probability in an answer.")
    max_deviations: float = Field(description="How many standard deviations an answer may be below the typical one.")
    min_distinct: Share = Field(
        default=0.0, description="The smallest share of distinct sequences of 4 words among all of an answer."
    )
    min_script: Share = Field(
        default=0.9, description="The smallest share of an answer's letters that are of a script of its prompt."
    )
    max_new_tokens: int | None = Field(
        default=None,
        gt=0,
        description="The number of tokens at which answers are cut. A shorter answer must end where a sentence ends. "
        "Left out, an answer may end anywhere.",
    )
    base: str = Field(default="", description="The fingerprint of the base. Other bases are rejected, unless empty.")
    about: dict[str, float] = Field(default={}, description="Figures of the calibration.")

    def least_log_prob(self, num_tokens: int) -> float:
        """Return the least mean log-probability of an answer of `num_tokens` tokens, at least 1."""
        return self.typical - self.max_deviations * self.deviation(num_tokens)

    def deviation(self, num_tokens: int) -> float:
        """Return the standard deviation of the mean log-probability of answers of `num_tokens` tokens."""
        return math.hypot(self.between_texts, self.between_tokens / math.sqrt(num_tokens))
