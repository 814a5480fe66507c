"""A server that keeps the playground's contract without a model: answers that name their mixture, word by word.

It stands in where a test has to decide what the server does: how fast it streams, which scores it gives, whether it has
a store of profiles.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

import personalized_soups

FOLDER = Path(personalized_soups.__file__).parent / "serving" / "playground"

# What the real server sends with the page: a script, a style or a request from anywhere else is refused by the browser.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}

DIMENSIONS = {
    "expertise": ("How much prior knowledge an answer asks of its reader.", ["elementary", "expert"]),
    "informativeness": ("How much an answer tells beyond what was asked.", ["concise", "informative"]),
    "style": ("The tone in which an answer speaks to its reader.", ["friendly", "unfriendly"]),
}
_ABOUT = {
    "elementary": "Explain it so that a child in elementary school can follow.",
    "expert": "Write for a researcher who holds a doctorate in the subject.",
    "concise": "Keep it short and come straight to the point.",
    "informative": "Tell everything that matters, with all of the background.",
    "friendly": "Answer like a good friend, with warmth and a sense of humor.",
    "unfriendly": "Answer without any warmth, in a cold and unfriendly tone.",
}
_TEXT = "Wash the old kettle in warm water and soap. Then rub it dry with a clean towel, so that it looks nice again."


@dataclass
class Mock:
    """What the mock does, to be changed between requests, and the profiles that it holds."""

    delay: float = 0.01
    is_scored: bool = True
    has_store: bool = True
    has_questions: bool = True
    num_questions: int = 10
    bound_user: str | None = None
    chosen: dict[str, list[str]] = field(default_factory=dict)
    text: str = _TEXT
    extra: list[str] = field(default_factory=lambda: ["formal"])
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    older: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def versions(self, user: str) -> list[dict[str, Any]]:
        """Return all versions of a profile in the server's format, the oldest first."""
        return [
            {"object": "profile", "user": user, "version": number, "written_at": f"2026-01-{number:02}T10:00:00+00:00",
             "profile": {"user": user, **profile}}
            for number, profile in enumerate([*self.older.get(user, []), self.profiles[user]], 1)
        ]  # fmt: skip

    def experts(self) -> dict[str, Any]:
        """Return what `GET /v1/experts` gives: two experts a dimension, and the extra ones."""
        data = [
            _expert(name, dimension=dimension, about=_ABOUT[name])
            for dimension, (_, sides) in DIMENSIONS.items()
            for name in sides
        ]
        data += [_expert(name, dimension=None, about=None) for name in self.extra]
        dimensions = [
            {"name": name, "about": about, "sides": sides, "experts": sides, "is_scored": self.is_scored}
            for name, (about, sides) in DIMENSIONS.items()
        ]
        output = {"base": "tiny", "has_store": self.has_store, "preset_weight": 0.6}
        output |= {"has_questions": self.has_questions, "user": self.bound_user}
        return {"object": "list", **output, "data": data, "dimensions": dimensions}

    def weights_of(self, body: Mapping[str, Any]) -> dict[str, float]:
        """Return the mixture that a request asks for."""
        user = body["model"].removeprefix("soup:")
        profile = self.profiles[user] if user != body["model"] else body.get("profile", {"weights": {}})
        weights: dict[str, float] = profile["weights"]
        return weights


def application(mock: Mock) -> FastAPI:
    """Return the contract as an application, with the page at /playground/."""
    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def with_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    _add_lists(app, mock)
    _add_questions(app, mock)  # first: their paths are paths of profiles, too
    _add_profiles(app, mock)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        return StreamingResponse(_stream(mock, body), media_type="text/event-stream")

    @app.post("/v1/scores")
    async def scores(request: Request) -> dict[str, Any]:
        body = await request.json()
        return {"object": "list", "data": [_scores(answer) for answer in body["answers"]]}

    app.mount("/playground", StaticFiles(directory=FOLDER, html=True))
    return app


def _add_lists(app: FastAPI, mock: Mock) -> None:
    @app.get("/")
    async def root() -> RedirectResponse:
        return RedirectResponse("/playground/")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = ["tiny", *(f"soup:{user}" for user in mock.profiles)]
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}

    @app.get("/v1/experts")
    async def experts() -> dict[str, Any]:
        return mock.experts()


def _add_questions(app: FastAPI, mock: Mock) -> None:
    def state(user: str, num: int | None) -> dict[str, Any]:
        chosen, most = mock.chosen.get(user, []), num or mock.num_questions
        number = len(chosen) + 1
        question = {"object": "question", "id": f"q{number}", "number": number, "prompt": f"Prompt {number}?",
                    "answers": [f"First {number}. {mock.text}", f"Second {number}. {mock.text}"]}  # fmt: skip
        known = any(choice in {"first", "second"} for choice in chosen)
        estimate = {
            "sentence": "You prefer friendly answers. It is still open whether you prefer expert answers.",
            "notes": ["You chose the first answer all 6 times."] if chosen.count("first") > 5 else [],
            "agreement": 0.87,
            "profile": {"user": user, "weights": {"friendly": 0.6, "expert": 0.35}} if known else None,
        }
        return {"object": "questions", "user": user, "num_answered": len(chosen), "num_questions": most,
                "last_answered": f"q{len(chosen)}" if chosen else None, "done": len(chosen) >= most,
                "question": None if len(chosen) >= most else question, "estimate": estimate}  # fmt: skip

    path = "/v1/profiles/{user:path}/questions"

    @app.get(path)
    async def questions(user: str, num_questions: int | None = None) -> dict[str, Any]:
        return state(user, num_questions)

    @app.post(path)
    async def answer(user: str, request: Request, num_questions: int | None = None) -> Response:
        body, chosen = await request.json(), mock.chosen.setdefault(user, [])
        if body["question"] != f"q{len(chosen) + 1}":
            return _refusal(409, "that is not the current question", "not_asked")
        chosen.append(body["choice"])
        return JSONResponse(state(user, num_questions))

    @app.delete(path + "/last")
    async def take_back(user: str, question: str, num_questions: int | None = None) -> dict[str, Any]:
        if question == f"q{len(mock.chosen[user])}":
            mock.chosen[user].pop()
        return state(user, num_questions)

    @app.delete(path)
    async def delete(user: str) -> Response:
        mock.chosen.pop(user, None)
        return Response(status_code=204)

    @app.post(path + "/finish")
    async def finish(user: str) -> dict[str, Any]:
        mock.profiles[user] = state(user, None)["estimate"]["profile"]
        return mock.versions(user)[-1]


def _add_profiles(app: FastAPI, mock: Mock) -> None:
    @app.get("/v1/profiles")
    async def profiles(limit: int = 100, after: str = "", search: str = "") -> Response:
        if not mock.has_store:
            return _refusal(404, "this server has no store of profiles")
        if mock.bound_user is not None:
            return _refusal(403, "this API key is bound to one user", "forbidden_user")
        users = [user for user in sorted(mock.profiles) if user > after and search.lower() in user.lower()]
        data = [mock.versions(user)[-1] for user in users[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(users) > limit})

    @app.get("/v1/profiles/{user:path}")
    async def get(user: str, history: bool = False) -> Response:
        if user not in mock.profiles:
            return _refusal(404, f"no profile of {user!r} is stored")
        versions = mock.versions(user)
        return JSONResponse({"object": "list", "data": versions} if history else versions[-1])

    _add_writing(app, mock)


def _add_writing(app: FastAPI, mock: Mock) -> None:
    def refused(user: str, request: Request) -> Response | None:
        condition = request.headers.get("If-Match")
        current = f'"{len(mock.versions(user))}"' if user in mock.profiles else None
        if current is not None and request.headers.get("If-None-Match") == "*":
            return _refusal(412, f"the profile {user!r} exists")
        return None if condition in {None, current} else _refusal(412, f"{user!r} is at version {current}")

    @app.put("/v1/profiles/{user:path}")
    async def put(user: str, request: Request) -> Response:
        if (refusal := refused(user, request)) is not None:
            return refusal
        is_new = user not in mock.profiles
        if not is_new:
            mock.older.setdefault(user, []).append(mock.profiles[user])
        mock.profiles[user] = await request.json()
        etag = f'"{len(mock.versions(user))}"'
        return Response(status_code=201 if is_new else 200, headers={"ETag": etag})

    @app.delete("/v1/profiles/{user:path}")
    async def delete(user: str, request: Request) -> Response:
        if (refusal := refused(user, request)) is not None:
            return refusal
        del mock.profiles[user]
        mock.older.pop(user, None)
        return Response(status_code=204)


def _expert(name: str, *, dimension: str | None, about: str | None) -> dict[str, Any]:
    side = name if dimension else None
    row = {"name": name, "object": "expert", "dimension": dimension, "side": side, "about": about}
    return {**row, "rank": 8, "is_changed": False}


def _scores(answer: str) -> list[dict[str, Any]]:
    """Score 0.1 where the answer names a dimension's first side, 0.9 where it names the second, else 0.5."""
    rows = []
    for name, (_, (low, high)) in DIMENSIONS.items():
        value = 0.1 if f"{low}=" in answer else 0.9 if f"{high}=" in answer else 0.5
        rows.append({"dimension": name, "low": low, "high": high, "value": value, "is_valid": True})
    return rows


async def _stream(mock: Mock, body: Mapping[str, Any]) -> AsyncIterator[str]:
    weights = mock.weights_of(body)
    names = " ".join(f"{name}={weight:g}" for name, weight in weights.items()) or "base"
    words = f"{names}: {mock.text}".split(" ")[: body["max_tokens"]]
    for at, word in enumerate(words):
        await asyncio.sleep(mock.delay)
        yield _chunk({"content": word if at == 0 else f" {word}"})
    yield _chunk({}, finish="length" if len(words) == body["max_tokens"] else "stop")
    usage = {"prompt_tokens": 9, "completion_tokens": len(words), "total_tokens": 9 + len(words)}
    yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def _chunk(delta: Mapping[str, str], finish: str | None = None) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]})}\n\n"


def _refusal(status: int, message: str, code: str | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "code": code}
    return JSONResponse({"error": error}, status_code=status)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve on a free port of this machine, in a thread; yield the address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
