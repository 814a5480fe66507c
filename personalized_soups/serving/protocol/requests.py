"""What clients ask, in the words of OpenAI's protocol: checked, with what is not supported told by name."""

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

# Together with the fields of the requests below, these two tables sort every parameter of OpenAI's chat completions and
# completions: honoured (a field), passed over, or refused. A test compares them with the types of the openai package.

# Parameters that cannot change an answer of this server, whatever their value: notes, caches, billing, speed.
PASSED_OVER = frozenset({
    "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier", "service_tier", "store",
})  # fmt: skip

# Parameters that would change the answer, each with the values that ask for what happens anyway; null always does.
REFUSED: Mapping[str, tuple[Any, ...]] = {
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

# Keys of a message that say more than its text: calls, other media, reasoning, an answer to be continued. They may be
# there and empty. All other keys are passed over: they are a client's own notes (`id`, `createdAt`, ...).
REFUSED_KEYS = frozenset({
    # OpenAI's own
    "audio", "function_call", "refusal", "tool_call_id", "tool_calls",
    # of other servers and of the libraries that speak to them
    "attachments", "documents", "experimental_attachments", "files", "images", "partial", "prefix", "reasoning",
    "reasoning_content", "reasoning_details", "thinking", "thinking_blocks", "tools", "videos",
})  # fmt: skip
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})

Bias = Annotated[float, Field(ge=-100, le=100)]


class RequestBody(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _unsupported(name: str) -> PydanticCustomError:
    """Return the error for a name of the protocol that would change the answer; `validation_error` reads the name."""
    return PydanticCustomError("unsupported", "{name} is not supported by this server; leave it out", {"name": name})


class StreamOptions(RequestBody):
    """What a stream brings beside the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextPart(RequestBody):
    """A part of a message's content; other keys than these two are passed over (`cache_control`, ...)."""

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
        """Refuse what the message says beside its text; an answer's own message has those keys, empty."""
        if isinstance(given, Mapping):
            for name in given:
                if name in REFUSED_KEYS and given[name] not in _EMPTY:
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
        """Return it as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class AnswerRequest(RequestBody):
    """What all requests for answers may say."""

    default_max_tokens: ClassVar[int | None] = None

    model: str = Field(description="The base's name, or soup:USER (or soup:USER@VERSION) for a stored profile.")
    profile: dict[str, Any] | None = Field(
        default=None, description='A profile of the moment: {"weights": {"friendly": 0.6}}; with the base\'s name.'
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
    user: str | None = Field(default=None, description="Noted by nobody; whose soup it is, `model` says.")

    @model_validator(mode="before")
    @classmethod
    def _sort_parameters(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        kept = {}
        for name, value in given.items():
            if name in cls.model_fields or not (name in PASSED_OVER or name in REFUSED):
                kept[name] = value
            elif name in REFUSED and value is not None and value not in REFUSED[name]:
                raise _unsupported(name)
        return kept

    @field_validator("stop")
    @classmethod
    def _check_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > _MAX_STOPS:
            raise PydanticCustomError("too_many", "at most {most} stop strings", {"most": _MAX_STOPS})
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        wrong = next((name for name in bias or {} if not (name.isascii() and name.isdigit() and len(name) < 10)), None)
        if wrong is not None:
            raise PydanticCustomError("no_token", "{name} is no token id", {"name": repr(wrong)})
        if len(bias or {}) > _MAX_BIASED:
            raise PydanticCustomError("too_many", "at most {most} tokens", {"most": _MAX_BIASED})
        return bias

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("no_stream", "stream_options are given, and stream is not true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings at which answers end."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def num_choices(self) -> int:
        """Answers for each prompt."""
        return self.n or 1

    @property
    def num_tokens(self) -> int | None:
        """At how many tokens an answer is cut, where the request says so."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are told of at each place; None tells nothing."""
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, seed: int, place: int) -> SamplingParams:
        """Return how the tokens of answer number `place` are chosen; `seed` where the request has none."""
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
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("no_logprobs", "top_logprobs is given, and logprobs is not true")
        return self

    @property
    def num_tokens(self) -> int | None:
        """At how many tokens an answer is cut, where the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are told of at each place; None tells nothing."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[Message]:
        """Return the messages as chat templates take them."""
        return [message.plain() for message in self.messages]


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(AnswerRequest):
    """POST /v1/completions."""

    default_max_tokens: ClassVar[int | None] = 16  # the protocol's own

    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1)]
    logprobs: int | None = Field(default=None, ge=0, le=5)

    @property
    def num_logprobs(self) -> int | None:
        """How many likeliest tokens are told of at each place; None tells nothing."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return every prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        found: list[str | list[int]] = []
        alone: list[int] = []  # ids that stand for one prompt
        for each in self.prompt:
            if isinstance(each, int):
                alone.append(each)
            else:
                found.append(each)
        return [alone] if alone else found
