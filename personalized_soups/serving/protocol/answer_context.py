"""Everything that answering a request needs from the server."""

from __future__ import annotations

from dataclasses import dataclass

from personalized_soups.generation.generator import Generator
from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.protocol.expert_files import ExpertFiles
from personalized_soups.serving.protocol.metrics import Metrics
from personalized_soups.serving.protocol.profile_resolver import ProfileResolver


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """Everything that answering a request needs from the server.

    Attributes:
        batcher: generates the answers.
        resolver: finds the soup of each request.
        generator: encodes prompts.
        metrics: count requests, answers and tokens.
        files: of the experts; their digest is the system fingerprint.
        default_max_tokens: length limit of an answer to a chat request that sets none.
        request_seconds: time limit of a request.
    """

    batcher: Batcher
    resolver: ProfileResolver
    generator: Generator
    metrics: Metrics
    files: ExpertFiles
    default_max_tokens: int
    request_seconds: float
