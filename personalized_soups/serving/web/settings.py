"""How a server behaves: whom it serves, how much, and for how long. Importing this file loads no torch and no fastapi.

Every default of `psoups serve` that the server itself needs is written here or in `engine/limits.py`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from personalized_soups.serving.engine.limits import Limits


@dataclass(frozen=True, slots=True)
class Rules:
    """Who may send requests, and how much.

    Attributes:
        keys: accepted API keys; with none, every client is served.
        hosts: accepted names in the Host header, in addition to loopback names and IP addresses; `*` accepts any.
        origins: origins of other sites whose pages may send requests (CORS); none by default.
        max_body: bytes of a request's body.
        max_requests: requests served at once.
        body_seconds: how long a body may take to arrive.
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    max_body: int = 1 << 20
    max_requests: int = 1024
    body_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server behaves.

    Attributes:
        base: the model name under which the base is served.
        rules: who may send requests, and how much.
        limits: how much is generated at once.
        default_max_tokens: length limit of an answer to a chat request that sets none.
        request_seconds: how long a request may take.
        grace_seconds: how long running answers may continue after the server was asked to stop.
        users_in_metrics: count answers by user name in /metrics.
        started_with: the command-line options that say what is served. The playground offers them for copying; a server
            with API keys does not publish them.
    """

    base: str
    rules: Rules = field(default_factory=Rules)
    limits: Limits = field(default_factory=Limits)
    default_max_tokens: int = 512
    request_seconds: float = 600.0
    grace_seconds: float = 30.0
    users_in_metrics: bool = False
    started_with: Sequence[str] = ()
