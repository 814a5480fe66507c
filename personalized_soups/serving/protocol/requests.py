"""Requests of OpenAI's protocol.

A parameter that would change the answer and is not supported is rejected with an error that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from personalized_soups.generation.prompts import Message
from personalized_soups.serving.engine.token_sampler import SamplingParams

_MAX_SEED = 2**63 - 1
_MAX_CHOICES = 64
_MAX_STOPS = 16
_MAX_BIASED = 1024

# Every parameter of OpenAI's chat completions and completions belongs to one of three groups: supported (a field of the
# classes below), IGNORED or UNSUPPORTED. A test compares these groups with the types of the openai package.

# Parameters that never change an answer of this server. They concern notes, caches, billing and speed.
IGNORED = frozenset({
    "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store",
})  # fmt: skip

# Parameters that would change the answer. Each is rejected, except for null and the values listed with it, which change
# nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# Keys of a message that hold content other than text, such as tool calls, images or reasoning. Such a key is accepted
# only if its value is empty. All other unknown keys, such as `id`, are a client's own notes and are ignored.
UNSUPPORTED_KEYS = frozenset({
    # from OpenAI's protocol
    "audio", "function_call", "refusal", "tool_call_id", "tool_calls",
    # from other servers and their client libraries
    "attachments", "documents", "experimental_attachments", "files", "images", "partial", "prefix", "reasoning",
    "reasoning_content", "reasoning_details", "thinking", "thinking_blocks", "tools", "videos",
})  # fmt: skip
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})

Bias = Annotated[float, Field(ge=-100, le=100)]


class RequestBody(BaseModel):
    """Base class of requests and their parts. Types are checked strictly and unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _unsupported(name: str) -> PydanticCustomError:
    """Return the error for an unsupported parameter. `validation_error` reads the parameter's name from the error."""
    return PydanticCustomError("unsupported", "{name} is not supported by this server; remove it", {"name": name})


class StreamOptions(RequestBody):
    """Selects what a stream contains in addition to the answers."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(RequestBody):
    """A part of a message's content. Other keys, such as `cache_control`, are ignored."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class ChatMessage(RequestBody):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, given: Any) -> Any:
        """Reject content other than text.

        The messages of answers contain these keys with empty values, so empty values are accepted.
        """
        if isinstance(given, Mapping):
            for name in given:
                if name in UNSUPPORTED_KEYS and given[name] not in _EMPTY:
                    raise _unsupported(name)
        return given

    @field_validator("content", mode="before")
    @classmethod
    def _check_parts(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind != "text":
                raise PydanticCustomError(
                    "unsupported", "content of type {kind} is not supported by this server; send text",
                    {"kind": repr(kind)},
                )  # fmt: skip
        return content

    def plain(self) -> Message:
        """Return the message in the form that chat templates expect."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class AnswerRequest(RequestBody):
    """The parameters of both chat completions and completions."""

    default_max_tokens: ClassVar[int | None] = None

    model: str = Field(description="The base's name, or soup:USER (or soup:USER@VERSION) for a stored profile.")
    profile: dict[str, Any] | None = Field(
        default=None,
        description='A profile for this request only: {"weights": {"friendly": 0.6}}; `model` is the base\'s name.',
    )
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-_MAX_SEED, le=_MAX_SEED)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Bias] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="Ignored; `model` names the profile.")

    @model_validator(mode="before")
    @classmethod
    def _sort_parameters(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        kept = {}
        for name, value in given.items():
            if name in cls.model_fields or not (name in IGNORED or name in UNSUPPORTED):
                kept[name] = value
            elif name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                raise _unsupported(name)
        return kept

    @field_validator("stop")
    @classmethod
    def _check_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > _MAX_STOPS:
            raise PydanticCustomError("too_many", "at most {most} stop strings are allowed", {"most": _MAX_STOPS})
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        wrong = next((name for name in bias or {} if not (name.isascii() and name.isdigit() and len(name) < 10)), None)
        if wrong is not None:
            raise PydanticCustomError(
                "no_token", "{name} is not a token id; write a token id as a key such as '42'", {"name": repr(wrong)}
            )
        if len(bias or {}) > _MAX_BIASED:
            raise PydanticCustomError("too_many", "at most {most} tokens can have a bias", {"most": _MAX_BIASED})
        return bias

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("no_stream", "stream_options requires stream to be true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def num_choices(self) -> int:
        """The number of answers for each prompt."""
        return self.n or 1

    @property
    def num_tokens(self) -> int | None:
        """The maximum number of tokens of an answer; None if the request sets no maximum."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens to report with each token; None if no log-probabilities are requested."""
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of prompt and answer tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, seed: int, place: int) -> SamplingParams:
        """Return the sampling parameters of answer number `place`. `seed` is used if the request sets no seed."""
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=seed if self.seed is None else self.seed % (1 << 64),
            place=place,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=self.num_logprobs,
        )


class ChatRequest(AnswerRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("no_logprobs", "top_logprobs requires logprobs to be true")
        return self

    @property
    def num_tokens(self) -> int | None:
        """The maximum number of tokens of an answer; None if the request sets no maximum."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens to report with each token; None if no log-probabilities are requested."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[Message]:
        """Return the messages in the form that chat templates expect."""
        return [message.plain() for message in self.messages]


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(AnswerRequest):
    """The body of POST /v1/completions."""

    default_max_tokens: ClassVar[int | None] = 16  # as in OpenAI's protocol

    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1)]
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @property
    def num_logprobs(self) -> int | None:
        """The number of likeliest tokens to report with each token; None if no log-probabilities are requested."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts as a list. Each prompt is a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts: list[str | list[int]] = []
        token_ids: list[int] = []  # of a single prompt
        for part in self.prompt:
            if isinstance(part, int):
                token_ids.append(part)
            else:
                prompts.append(part)
        return [token_ids] if token_ids else prompts
