"""`Judge` declarations: what decides which of two answers follows a criterion better."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from personalized_soups.declare.declared import Declared
from personalized_soups.declare.dimension import ScorerSpec

NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(pattern=r"\S")]


class TokenPrices(Declared):
    """What an endpoint charges, in US dollars per million tokens."""

    input: NotNegative
    output: NotNegative

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Return the price of some tokens in US dollars.

        Example:
            >>> TokenPrices(input=2.0, output=8.0).cost(500_000, 250_000)
            3.0
        """
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


class LlmJudgeSpec(Declared):
    """A language model behind an endpoint of OpenAI's protocol. It is asked about each pair in both orders.

    The endpoint's address and key come from the environment variables `OPENAI_BASE_URL` and `OPENAI_API_KEY`.
    """

    kind: Literal["llm"]
    model: Text = Field(
        description="The model's name at the endpoint. Give a dated name, so that a rerun asks the same."
    )
    template: Text | None = Field(
        default=None,
        description="A file with the text of a question, with the places {criterion}, {prompt}, {first} and {second}. "
        "A relative path starts at the folder of this file. Left out, the shipped template is used.",
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        default=0.0, description="The sampling temperature. Write null for models that reject the parameter."
    )
    seed: int | None = Field(default=None, description="The sampling seed, for endpoints that take one.")
    max_tokens: Annotated[int, Field(gt=0)] = Field(
        default=512, description="The largest number of tokens of a reply, with the model's reasoning."
    )
    token_limit: Literal["max_completion_tokens", "max_tokens"] = Field(
        default="max_completion_tokens", description="The request's name for `max_tokens`. Old servers want max_tokens."
    )
    concurrency: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=8, description="The number of requests that run at once."
    )
    timeout: Annotated[float, Field(gt=0)] = Field(default=60.0, description="Seconds until a request is tried again.")
    max_retries: Annotated[int, Field(ge=0)] = Field(
        default=6, description="How often a failed request is tried again: after 1, 2, 4, ... seconds."
    )
    first_wait: NotNegative = Field(default=1.0, description="Seconds before the first retry. Each retry doubles them.")
    prices: TokenPrices | None = Field(default=None, description="What the endpoint charges, for the report of costs.")


class RewardModelJudgeSpec(Declared):
    """A sequence classifier with one output. The answer with the larger output wins."""

    kind: Literal["reward_model"]
    model: Text = Field(description="The folder or hub id of the classifier.")
    min_gap: NotNegative = Field(default=0.0, description="A smaller or equal difference of the outputs is a tie.")


class ScorerJudgeSpec(Declared):
    """A scorer of the catalogue's kinds. The answer whose score is nearer to one end wins."""

    kind: Literal["scorer"]
    scorer: ScorerSpec
    end: Literal["low", "high"] = Field(default="high", description="The end of the scale that wins.")
    min_gap: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="A smaller or equal difference of the scores is a tie."
    )


JudgeKind = Annotated[LlmJudgeSpec | RewardModelJudgeSpec | ScorerJudgeSpec, Field(discriminator="kind")]


class JudgeFile(Declared):
    """A file that declares one judge."""

    judge: JudgeKind
