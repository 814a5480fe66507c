"""The parts of the server that are needed to answer a request."""

from __future__ import annotations

from dataclasses import dataclass

from personalized_soups.generation.generator import Generator
from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.protocol.expert_files import ExpertFiles
from personalized_soups.serving.protocol.metrics import Metrics
from personalized_soups.serving.protocol.profile_resolver import ProfileResolver


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """The parts of the server that are needed to answer a request.

    Attributes:
        batcher: generates the answers.
        resolver: finds the soup (the weighted sum of the experts) of each request.
        generator: has the tokenizer that encodes prompts.
        metrics: counts requests, answers and tokens.
        files: the experts' files. Their digest is part of the `system_fingerprint` in responses.
        default_max_tokens: maximum number of tokens of a chat answer, if the request sets no maximum.
        request_seconds: time limit of a request, in seconds.
    """

    batcher: Batcher
    resolver: ProfileResolver
    generator: Generator
    metrics: Metrics
    files: ExpertFiles
    default_max_tokens: int
    request_seconds: float
