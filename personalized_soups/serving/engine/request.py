"""A request for one answer, and the pieces in which the answer is delivered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.errors import InputError, UsageError
from personalized_soups.serving.engine.token_sampler import SamplingParams, TokenLogprobs


class Finish(StrEnum):
    """The reason why an answer ended, named as in OpenAI's protocol."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Piece:
    """The token and the text that one step adds to an answer.

    Attributes:
        token: the chosen token; None if an error ended the answer.
        text: the text that has become final with this step. It may be empty.
        logprobs: the log-probabilities of the token, if the request asked for them.
        finish: the reason why the answer ended; None if it continues or if an error ended it.
        error: the exception that ended the answer, if any.
    """

    token: int | None = None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    finish: Finish | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether this is the last piece of the answer."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class GenerationRequest:
    """A request for one answer.

    Attributes:
        tokens: the tokens of the prompt.
        weights: the weights of the request's soup. The submitter must have checked the names of the experts.
        max_new_tokens: maximum number of tokens of the answer.
        sampling_params: how the answer's tokens are chosen.
        stops: strings that end the answer. They are not part of its text.
        ignore_eos: whether the answer continues after an end token, as benchmarks need.
        destination: tells the submitter where to deliver the pieces. The engine does not use it.
    """

    tokens: Sequence[int]
    weights: ExpertWeights
    max_new_tokens: int
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    stops: Sequence[str] = ()
    ignore_eos: bool = False
    destination: Any = None

    def check(self, *, vocab_size: int, max_context: int) -> None:
        """Check that the model can process the request.

        An invalid request would fail a step that it shares with other requests. On a GPU, this can end the process.

        Args:
            vocab_size: number of tokens for which the model has an embedding.
            max_context: maximum number of tokens of prompt and answer together.

        Raises:
            InputError: if the prompt or the answer has no tokens, if both have too many tokens together, or if a token
                id is unknown.
            UsageError: if a weight depends on the number of the generated token.
        """
        if not self.tokens or self.max_new_tokens < 1:
            raise InputError(
                f"the prompt has {len(self.tokens)} tokens and the answer may have {self.max_new_tokens}; "
                "both numbers must be at least 1",
                where="prompt",
                mend="give a prompt with at least one token, and set max_new_tokens to 1 or more",
            )
        token_ids = [*self.tokens, *self.sampling_params.logit_bias]
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise InputError(
                f"token ids must be from 0 to {vocab_size - 1}, got ids from {min(token_ids)} to {max(token_ids)}",
                where="prompt or logit_bias",
                mend="encode the prompt with the tokenizer of the base",
            )
        if (num_tokens := len(self.tokens) + self.max_new_tokens) > max_context:
            raise InputError(
                f"prompt and answer may have {num_tokens} tokens together, but at most {max_context} fit into the "
                "context",
                where="prompt",
                mend="shorten the prompt, or set max_new_tokens to a lower number",
            )
        if self.weights.is_scheduled:
            raise UsageError(
                "a weight depends on the number of the generated token, but continuous batching supports only constant "
                "weights",
                where="weights",
                mend="give numbers as weights, for example {'friendly': 0.6}, or call SoupModel.generate",
            )
