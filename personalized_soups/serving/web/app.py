"""`Server`: an ASGI application that serves one base, its experts and a profile store."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, RedirectResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from personalized_soups import __version__
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import SoupError, UsageError
from personalized_soups.mixing.model import SoupModel
from personalized_soups.scoring.scales import Scales
from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.protocol.answer_context import AnswerContext
from personalized_soups.serving.protocol.expert_files import ExpertFiles
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.protocol.metrics import Metrics
from personalized_soups.serving.protocol.piece_queue import PieceDispatcher
from personalized_soups.serving.protocol.profile_resolver import ProfileResolver
from personalized_soups.serving.protocol.requests import ChatRequest, CompletionRequest
from personalized_soups.serving.protocol.strict_json import validation_error
from personalized_soups.serving.protocol.token_buckets import TokenBuckets
from personalized_soups.serving.protocol.user_questions import UserQuestions
from personalized_soups.serving.web.guard import Guard
from personalized_soups.serving.web.retention import Retention
from personalized_soups.serving.web.routes import answering, experts, health, profiles, questions
from personalized_soups.serving.web.routes.user_paths import PROFILES, UserPaths, user_path, without_mark
from personalized_soups.serving.web.settings import Settings
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.answers.stopping import StoppingRule
from personalized_soups.users.profiles.store import ProfileStore

_ROUTES = frozenset({
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/profiles", "/v1/experts", "/v1/experts/reload",
    "/v1/scores", "/metrics",
})  # fmt: skip

PLAYGROUND = Path(__file__).parents[1] / "playground"


class Server:
    """An ASGI application with all routes, and the batcher that generates the answers.

    Create a server in the event loop that runs it. `close` ends the batcher's thread.

    Args:
        model: the base with its experts and a tokenizer.
        settings: the server's settings.
        files: detects changes of the experts' files.
        store: the profile store. Its `check` should reject profiles that the model cannot serve.
        catalogue: the dimensions with their names, sides and scorers.
        pool: the questions that users are asked. They need a store.

    Attributes:
        app: the ASGI application.

    Raises:
        SoupError: if the batcher cannot run the model, a scorer in the catalogue cannot be found, or the questions
            cannot be used.
    """

    def __init__(
        self,
        model: SoupModel,
        settings: Settings,
        *,
        files: ExpertFiles,
        store: ProfileStore | None = None,
        catalogue: Catalogue | None = None,
        pool: QuestionPool | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics(settings.limits.max_rows, by_user=settings.users_in_metrics)
        scales = Scales(catalogue)
        asking = None if pool is None else _user_questions(pool, store, settings, catalogue)
        if asking is not None:
            asking.use_experts(model.experts)
        dispatcher = PieceDispatcher(asyncio.get_running_loop())
        self.batcher = Batcher(model, dispatcher.deliver, settings.limits, on_step=self.metrics.step)
        context = AnswerContext(
            batcher=self.batcher,
            resolver=ProfileResolver(model, settings.base, store, files),
            generator=model.generator,
            metrics=self.metrics,
            files=files,
            default_max_tokens=settings.default_max_tokens,
            request_seconds=settings.request_seconds,
        )
        api = FastAPI(
            title="personalized_soups",
            version=__version__,
            description="One base, and a soup of its experts for every request.",
            docs_url=None,  # the page would load scripts from another host
            redoc_url=None,
            redirect_slashes=False,
        )
        api.include_router(answering.router(context, store))
        api.include_router(
            experts.router(
                settings.base,
                model=model,
                batcher=self.batcher,
                files=files,
                catalogue=catalogue,
                scales=scales,
                has_store=store is not None,
                questions=asking,
                started_with=() if settings.rules.keys else settings.started_with,
            )
        )
        if asking is None or store is None:
            api.include_router(questions.no_questions())
        else:
            api.include_router(questions.router(asking, store, TokenBuckets(settings.answers_per_minute)))
        api.include_router(profiles.no_store() if store is None else profiles.router(store))
        api.include_router(health.router(self.batcher, store, self.metrics))
        _add_playground(api)
        _add_faults(api)
        self._guard = Guard(
            UserPaths(api), settings.rules, retry_after=self.batcher.retry_after, on_response=self._count_response
        )
        self.app: ASGIApp = self._guard
        # Python may collect a task that nothing refers to. The runner of the event loop cancels this task at the end.
        self._expiring: asyncio.Task[None] | None = None
        if store is not None and settings.answer_retention is not None:
            retention = Retention(store.answers, settings.answer_retention)
            self._expiring = asyncio.get_running_loop().create_task(retention.run())

    def refuse_bodies(self) -> None:
        """Reject requests whose body has not arrived yet. Call this when the server is about to shut down."""
        self._guard.refuse_bodies()

    def close(self) -> None:
        """End the batcher's thread. Answers that are still being generated end with an error."""
        self.batcher.close(finish=False, timeout=self.settings.grace_seconds)

    def _count_response(self, scope: Scope, status: int) -> None:
        self.metrics.responded(_route_of(scope), status)


def _user_questions(
    pool: QuestionPool, store: ProfileStore | None, settings: Settings, catalogue: Catalogue | None
) -> UserQuestions:
    if store is None:
        raise UsageError(
            "answers to questions need a profile store",
            where="pool",
            mend="give the store that keeps profiles and answers, for example profiles.db",
        )
    stopping = StoppingRule(max_questions=settings.num_questions, certainty=settings.certainty)
    return UserQuestions(pool, store, stopping, catalogue)


def _route_of(scope: Scope) -> str:
    """Return the template of a request's route, for example `/v1/profiles/{user:any}`.

    The template is used in metrics, so that they contain no user names. If the request was rejected before routing, the
    template is derived from its path; it is `other` for an unknown path.
    """
    route = scope.get("route")
    if route is not None:
        return str(getattr(route, "path", "other"))
    found = user_path(scope)
    if found is not None:
        return f"{PROFILES}{{user:any}}{found.resource}"
    path: str = scope["path"]
    return path if path in _ROUTES else "other"


def _add_playground(api: FastAPI) -> None:
    @api.get("/", include_in_schema=False)
    @api.get("/playground", include_in_schema=False)
    async def to_playground(request: Request) -> Response:
        return RedirectResponse("playground/")

    @api.get("/favicon.ico", include_in_schema=False)
    async def favicon() -> Response:
        return FileResponse(PLAYGROUND / "favicon.svg", media_type="image/svg+xml")

    api.mount("/playground", StaticFiles(directory=PLAYGROUND, html=True), name="playground")


def _add_faults(api: FastAPI) -> None:
    """Add handlers that send every error in the format of OpenAI's API."""
    known = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields})

    @api.exception_handler(ApiError)
    async def on_api_error(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, ApiError)
        return fault.response()

    @api.exception_handler(SoupError)
    async def on_soup_error(request: Request, fault: Exception) -> Response:
        return api_error(fault).response()

    @api.exception_handler(RequestValidationError)
    async def on_validation(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, RequestValidationError)
        return validation_error(fault, known).response()

    @api.exception_handler(HTTPException)
    async def on_http(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, HTTPException)
        path = without_mark(request.url.path)
        messages: dict[int, str] = {
            404: f"Unknown request URL: {request.method} {path}",
            405: f"The method {request.method} is not allowed for {path}",
        }
        message = messages.get(fault.status_code, str(fault.detail))
        return ApiError(fault.status_code, message, code=None, headers=fault.headers).response()

    @api.exception_handler(Exception)
    async def on_bug(request: Request, fault: Exception) -> Response:
        return api_error(fault).response()
