"""The server's settings. Importing this module imports neither torch nor fastapi.

The defaults of `psoups serve` for these settings are defined only here and in `engine/limits.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from personalized_soups.serving.engine.limits import Limits


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key.

    Attributes:
        text: the key, as clients send it.
        user: the only user whose profile, answers and soup the key may use. None means full access.
    """

    text: str = field(repr=False)
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules for clients and requests. The server rejects requests that break a rule.

    Attributes:
        keys: accepted API keys. If there are none, requests need no key.
        hosts: accepted names in the Host header, in addition to loopback names and IP addresses; `*` accepts all.
        origins: origins of other sites whose pages may send requests (CORS), for example `https://app.example.com`.
        max_body: maximum size of a request's body, in bytes.
        max_requests: maximum number of requests served at once.
        body_seconds: maximum time for a request's body to arrive, in seconds.
    """

    keys: Sequence[ApiKey] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    max_body: int = 1 << 20
    max_requests: int = 1024
    body_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a server.

    Attributes:
        base: the model name of the base in requests and responses.
        rules: rules for clients and requests.
        limits: limits of the batcher.
        default_max_tokens: maximum number of tokens of a chat answer, if the request sets no maximum.
        request_seconds: time limit of a request, in seconds.
        grace_seconds: seconds that running answers may continue after the server was asked to stop.
        num_questions: maximum number of questions that a user is asked.
        certainty: stop asking when the expected agreement is at least this (see `StoppingRule`). None asks all of them.
        answers_per_minute: maximum number of answers to questions that a user may send in a minute.
        answer_retention: answers to questions are deleted after this time. None keeps them.
        users_in_metrics: whether /metrics counts the answers of each user by name.
        started_with: the command-line options that select what is served. The playground shows them for copying. A
            server with API keys does not publish them.
    """

    base: str
    rules: Rules = field(default_factory=Rules)
    limits: Limits = field(default_factory=Limits)
    default_max_tokens: int = 512
    request_seconds: float = 600.0
    grace_seconds: float = 30.0
    num_questions: int = 10
    certainty: float | None = None
    answers_per_minute: int = 60
    answer_retention: timedelta | None = None
    users_in_metrics: bool = False
    started_with: Sequence[str] = ()
