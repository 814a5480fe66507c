"""POST /v1/chat/completions and /v1/completions, GET /v1/models."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from personalized_soups.serving.protocol.answer_context import AnswerContext
from personalized_soups.serving.protocol.event_stream import EventStream
from personalized_soups.serving.protocol.formats import PendingChat, PendingCompletion
from personalized_soups.serving.protocol.key_user import key_user
from personalized_soups.serving.protocol.pending_answers import PendingAnswers
from personalized_soups.serving.protocol.profile_resolver import SOUP
from personalized_soups.serving.protocol.requests import ChatRequest, CompletionRequest
from personalized_soups.serving.protocol.strict_json import BodyRoute
from personalized_soups.serving.protocol.submission import submit
from personalized_soups.users.profiles.store import ProfileStore, UnknownProfile

# Maximum number of stored profiles that GET /v1/models lists.
_LISTED = 100


def router(context: AnswerContext, store: ProfileStore | None) -> APIRouter:
    """Return the routes of this module."""
    routes = APIRouter(route_class=BodyRoute, tags=["OpenAI"])
    reading = APIRouter(tags=["OpenAI"])
    since = int(time.time())

    async def answered(pending: PendingAnswers, request: Request) -> Response:
        if pending.request.stream:
            return EventStream(pending, request.receive)
        return await pending.whole_response(request.receive)

    @routes.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation with the soup that the request selects.

        If `stream` is true, the answer is sent as server-sent events.
        """
        started = time.perf_counter()
        pending = await submit(
            context, body, [body.conversation()], PendingChat, started, bound=key_user(request.scope)
        )
        return await answered(pending, request)

    @routes.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or lists of token ids, without a chat template."""
        started = time.perf_counter()
        bound = key_user(request.scope)
        pending = await submit(context, body, body.prompts(), PendingCompletion, started, bound=bound)
        return await answered(pending, request)

    @reading.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        """List the base and the first 100 stored profiles, which are named `soup:USER`.

        If the API key is bound to a user, only this user's profile is listed.
        """
        names = [context.resolver.base]
        if store is not None:
            names += [f"{SOUP}{user}" for user in _listed(store, key_user(request.scope))]
        return {"object": "list", "data": [_model(name, since) for name in names]}

    @reading.get("/v1/models/{model:any}")
    async def one_model(model: str, request: Request) -> dict[str, Any]:
        """Return one model, which is the base or the soup of a stored profile."""
        profile = await run_in_threadpool(context.resolver.resolve, model, None, key_user(request.scope))
        return _model(profile.model if profile.kind == "base" else model, since)

    routes.include_router(reading)
    return routes


def _listed(store: ProfileStore, bound: str | None) -> list[str]:
    """Return the users whose profiles are listed."""
    if bound is None:
        return [stored.profile.user for stored in store.page(limit=_LISTED)]
    try:
        return [store.get(bound).profile.user]
    except UnknownProfile:
        return []


def _model(name: str, since: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": since, "owned_by": "personalized_soups"}
