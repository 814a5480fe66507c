"""Turns a request into pending answers: finds the soup, encodes the prompts, and submits them to the batcher.

A soup is the weighted sum of the experts.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool

from personalized_soups.errors import SoupError
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.prompts import encode_prompt
from personalized_soups.serving.engine.request import GenerationRequest
from personalized_soups.serving.protocol.answer_context import AnswerContext
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.protocol.pending_answers import PendingAnswers
from personalized_soups.serving.protocol.piece_queue import PieceQueue
from personalized_soups.serving.protocol.profile_resolver import SOUP
from personalized_soups.serving.protocol.requests import AnswerRequest, ChatRequest

# Prompts with more characters are encoded on another thread, so that the event loop can send other answers meanwhile.
_LONG_PROMPT = 8192


async def submit(
    context: AnswerContext,
    request: AnswerRequest,
    prompts: Sequence[Any],
    kind: type[PendingAnswers],
    started: float,
    *,
    bound: str | None,
) -> PendingAnswers:
    """Submit a request to the batcher, and return its pending answers.

    The first `n` answers belong to the first prompt, the next `n` answers to the second prompt, and so on.

    Args:
        context: the parts of the server that are needed to answer.
        request: the request that the client sent.
        prompts: plain texts, conversations, or lists of token ids.
        kind: the class that writes the answers in the format of the endpoint.
        started: when the request arrived, by time.perf_counter().
        bound: the user to whom the request's API key is bound, or None (`key_user`).

    Raises:
        ApiError: if the request cannot be served, or too many requests wait.
        ExpertsChangedError: if the files of an expert in the profile have changed since they were loaded.
    """
    _check_number(context, len(prompts) * request.num_choices)
    resolve = partial(context.resolver.resolve, request.model, request.profile, bound)
    # reading a stored profile blocks, because the store is on a disk or another machine
    profile = await run_in_threadpool(resolve) if request.model.startswith(SOUP) else resolve()
    encoded = await _encoded(context.generator, prompts)
    queue = PieceQueue()
    seed = secrets.randbits(63)
    generations: list[GenerationRequest] = []
    for place, tokens in enumerate(tokens for tokens in encoded for _ in range(request.num_choices)):
        generations.append(
            GenerationRequest(
                tokens,
                profile.weights,
                _max_new_tokens(context, request, len(tokens)),
                request.sampling_params(seed, place),
                request.stops,
                destination=(queue, place),
            )
        )
    _check_bias(context, request)
    try:
        context.batcher.submit(generations)
    except SoupError as error:
        raise api_error(error, retry_after=context.batcher.retry_after()) from error
    num_prompt_tokens = sum(map(len, encoded))
    context.metrics.submitted(profile, len(generations), num_prompt_tokens)
    return kind(context, request, profile, generations, num_prompt_tokens, started)


def _check_number(context: AnswerContext, num_answers: int) -> None:
    """Check that the batcher could accept the number of answers. This is checked before the prompts are encoded.

    Raises:
        ApiError: 400 if the request asks for too many answers.
    """
    limits = context.batcher.limits
    most = limits.max_rows + limits.max_waiting
    if num_answers > most:
        raise ApiError(
            400,
            f"the request asks for {num_answers} answers, but this server accepts at most {most} in one request",
            param="n",
            code="invalid_value",
        )


async def _encoded(generator: Generator, prompts: Sequence[Any]) -> list[list[int]]:
    def encode() -> list[list[int]]:
        return [_encode(generator, prompt) for prompt in prompts]

    if len(prompts) > 1 or sum(len(str(prompt)) for prompt in prompts) > _LONG_PROMPT:
        return await run_in_threadpool(encode)
    return encode()


def _encode(generator: Generator, prompt: Any) -> list[int]:
    from jinja2.exceptions import TemplateError

    is_tokens = isinstance(prompt, list) and isinstance(prompt[0], int)
    if is_tokens:
        _check_token(generator, max(prompt), "prompt")
        return list(prompt)
    try:
        if isinstance(prompt, str):
            tokens = list(map(int, generator.tokenizer(prompt, verbose=False)["input_ids"]))
        else:
            tokens = encode_prompt(generator.tokenizer, prompt)
    except TemplateError as error:
        raise ApiError(
            400, f"the base's chat template rejects the messages: {error}", param="messages", code="invalid_value"
        ) from error
    except SoupError as error:  # `error.where` is not sent, because it is a path on the server
        raise ApiError(400, f"{error.what}; {error.mend}", param="messages", code="invalid_value") from error
    if not tokens:
        raise ApiError(400, "the prompt is empty", param="prompt", code="invalid_value")
    return tokens


def _max_new_tokens(context: AnswerContext, request: AnswerRequest, num_prompt: int) -> int:
    """Return the maximum number of tokens of an answer to a prompt with `num_prompt` tokens.

    Raises:
        ApiError: 400 if prompt and answer do not fit into the context together.
    """
    max_context = context.batcher.limits.max_context
    num_new = request.num_tokens or request.default_max_tokens
    if num_new is None:
        num_new = max(1, min(context.default_max_tokens, max_context - num_prompt))
    if num_prompt + num_new > max_context:
        prompt_param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise ApiError(
            400,
            f"This model's maximum context length is {max_context} tokens; you requested {num_prompt + num_new} "
            f"({num_prompt} in the prompt, {num_new} for the answer)",
            param="max_tokens" if num_prompt < max_context else prompt_param,
            code="context_length_exceeded",
        )
    return num_new


def _check_bias(context: AnswerContext, request: AnswerRequest) -> None:
    if request.logit_bias:
        _check_token(context.generator, max(map(int, request.logit_bias)), "logit_bias")


def _check_token(generator: Generator, token: int, param: str) -> None:
    size = generator.model.config.get_text_config(decoder=True).vocab_size
    if token >= size:
        raise ApiError(
            400, f"the base has no token {token}; its token ids are 0 to {size - 1}", param=param, code="invalid_value"
        )
