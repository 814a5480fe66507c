"""/v1/profiles/{user}/questions: ask a user questions, store the answers, and write the profile that they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, HTTPException, Query, Response
from starlette.responses import JSONResponse

from personalized_soups.errors import SoupError
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.protocol.question_bodies import AnswerRequest, QuestionsState
from personalized_soups.serving.protocol.strict_json import StrictRoute
from personalized_soups.serving.protocol.token_buckets import TokenBuckets
from personalized_soups.serving.protocol.user_questions import UserQuestions
from personalized_soups.serving.web.routes.profiles import (
    IfMatch,
    IfNoneMatch,
    check_name,
    content_of,
    etag_of,
    expected_version,
    version_of,
)
from personalized_soups.users.profiles.store import ProfileStore

QUESTIONS = "/v1/profiles/{user:any}/questions"
LAST = f"{QUESTIONS}/last"
FINISH = f"{QUESTIONS}/finish"

# The methods of each path, and of /v1/profiles/{user}, whose route also matches the path.
_METHODS = {QUESTIONS: ["GET", "POST", "DELETE"], LAST: ["DELETE"], FINISH: ["POST"]}
_METHODS_OF_PROFILES = ["GET", "PUT", "DELETE"]

# Maximum number of threads that answer these requests at once. Other requests need threads, too.
_THREADS = 8

_MAX_QUESTIONS = 1000

NumQuestions = Annotated[
    int | None,
    Query(
        ge=1,
        le=_MAX_QUESTIONS,
        description="Ask this many questions, instead of stopping when the server's own rule says so.",
    ),
]


def router(questions: UserQuestions, store: ProfileStore, buckets: TokenBuckets) -> APIRouter:
    """Return the routes of this module. Include them before those of the profiles, which match the same paths.

    Args:
        questions: asks the questions.
        store: the profile store.
        buckets: limits how often a user may answer.
    """
    routes = APIRouter(route_class=StrictRoute, tags=["questions"])
    threads = CapacityLimiter(_THREADS)

    async def run(work: Any, user: str, *arguments: Any, is_limited: bool = True) -> Any:
        check_name(user)
        if is_limited:
            buckets.take(user)
        return await to_thread.run_sync(partial(work, user, *arguments), limiter=threads)

    @routes.get(QUESTIONS)
    async def get_questions(user: str, num_questions: NumQuestions = None) -> QuestionsState:
        """Return the user's next question, and the estimate after the answers so far."""
        state: QuestionsState = await run(questions.state, user, num_questions, is_limited=False)
        return state

    @routes.post(QUESTIONS)
    async def answer_question(user: str, body: AnswerRequest, num_questions: NumQuestions = None) -> QuestionsState:
        """Store the answer to the current question, and return the next question.

        The request may be repeated: an answer that is stored already is not stored again.
        """
        state: QuestionsState = await run(questions.answer, user, body.question, body.choice, num_questions)
        return state

    @routes.delete(LAST)
    async def take_answer_back(
        user: str,
        question: Annotated[
            str | None,
            Query(
                max_length=64,
                description="Delete the last answer only if it belongs to this question, so that the request may be "
                "repeated.",
            ),
        ] = None,
        num_questions: NumQuestions = None,
    ) -> QuestionsState:
        """Delete the user's last answer, and return the question again."""
        state: QuestionsState = await run(questions.take_back, user, question, num_questions)
        return state

    @routes.delete(QUESTIONS, status_code=204)
    async def delete_answers(user: str) -> Response:
        """Delete all answers of the user. The profile stays."""
        await run(questions.forget, user)
        return Response(status_code=204)

    @routes.post(FINISH)
    async def finish_questions(user: str, if_match: IfMatch = None, if_none_match: IfNoneMatch = None) -> JSONResponse:
        """Write the profile that the answers give as the next version of the user's profile."""
        response: JSONResponse = await run(finish, user, if_match, if_none_match)
        return response

    def finish(user: str, if_match: str | None, if_none_match: str | None) -> JSONResponse:
        profile = questions.profile(user)
        condition = expected_version(store, user, if_match, if_none_match)
        is_new = version_of(store, user) is None
        try:
            stored = store.put(profile, expected=condition)
        except SoupError as fault:
            raise api_error(fault, status=422) from fault
        return JSONResponse(content_of(stored), status_code=201 if is_new else 200, headers=etag_of(stored))

    _refuse_other_methods(routes)
    return routes


def no_questions() -> APIRouter:
    """Return routes that answer with the error that the server asks no questions."""
    routes = APIRouter(tags=["questions"])

    def refuse() -> None:
        raise ApiError(404, "this server was started without questions", code="no_questions")

    for path, methods in _METHODS.items():
        routes.add_api_route(path, refuse, methods=methods, include_in_schema=False)
    _refuse_other_methods(routes)
    return routes


def _refuse_other_methods(routes: APIRouter) -> None:
    """Add routes that reject the other methods, so that a path never means a profile with one of its methods."""
    for path, methods in _METHODS.items():
        others = [method for method in _METHODS_OF_PROFILES if method not in methods]
        routes.add_api_route(path, _refusing(methods), methods=others, include_in_schema=False)


def _refusing(allowed: Sequence[str]) -> Callable[[], None]:
    def refuse() -> None:
        raise HTTPException(405, headers={"Allow": ", ".join(allowed)})

    return refuse
