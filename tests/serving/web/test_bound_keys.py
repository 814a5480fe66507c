"""API keys that are bound to one user: what they may use, and that they may use nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute, Mount, Route

from personalized_soups.declare.profile import Profile
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.routes.user_paths import UserPaths
from personalized_soups.serving.web.settings import ApiKey, Rules, Settings
from tests.serving.servers import Reply, RunningServer, running
from tests.serving.web.routes.pools import pool_of
from tests.users.profiles.evidence import answered

# A key for each user, and one with full access.
USERS = ("ada", "bob", "ada/questions", "ada@1", "Ada King, Countess of Lovelace", "ada\n", "nobody")
KEYS = {user: f"key-number-{number}-of-some-length" for number, user in enumerate(USERS)}
FULL = "a-key-with-full-access-to-all-routes"

# Weights that no other user has, so that a response that shows a user's profile contains the number.
MARKS = {user: 0.125 + number / 1024 for number, user in enumerate(USERS)}


@pytest.fixture(scope="module")
def bound(small_base: Path, expert_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    rules = Rules(keys=[*(ApiKey(key, user) for user, key in KEYS.items()), ApiKey(FULL)])
    settings = Settings("small", rules=rules, limits=Limits(max_context=256), answers_per_minute=10_000)
    store = tmp_path_factory.mktemp("store") / "profiles.db"
    with running(small_base, expert_folders, settings, profiles=store, pool=pool_of(expert_folders)) as served:
        assert served.store is not None
        for user in USERS[:-1]:
            served.store.put(Profile(user=user, weights={"warm": MARKS[user]}))
        yield served


def ask(served: RunningServer, key: str, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    return served.ask(method, path, body, {"Authorization": f"Bearer {key}", **headers})


def chat(served: RunningServer, key: str, model: str, **fields: Any) -> Reply:
    body = {"model": model, "messages": [{"role": "user", "content": "wash it"}], "max_tokens": 2, **fields}
    return ask(served, key, "POST", "/v1/chat/completions", body)


def check_refused(reply: Reply) -> None:
    """Check that a reply is the refusal of a bound key, which tells nothing about other users."""
    assert (reply.status, reply.error["code"], reply.error["type"]) == (403, "forbidden_user", "permission_error")
    assert "bound to one user" in reply.error["message"]


def path_of(user: str, rest: str = "") -> str:
    return f"/v1/profiles/{quote(user, safe='')}{rest}"


def test_a_bound_key_reads_and_writes_its_own_profile(bound: RunningServer) -> None:
    for user in USERS[:-1]:
        reply = ask(bound, KEYS[user], "GET", path_of(user))
        assert (reply.status, reply.json["profile"]["weights"]) == (200, {"warm": MARKS[user]})
    key, path = KEYS["nobody"], path_of("nobody")
    assert ask(bound, key, "GET", path).status == 404
    assert ask(bound, key, "PUT", path, {"weights": {"warm": 0.5}}).status == 201
    assert ask(bound, key, "GET", f"{path}?history=true").json["data"][0]["version"] == 1
    assert ask(bound, key, "DELETE", path).status == 204


def test_a_bound_key_answers_its_own_users_questions(bound: RunningServer) -> None:
    for user in ("ada", "ada/questions"):
        path = path_of(user, "/questions")
        state = ask(bound, KEYS[user], "GET", path).json
        reply = ask(bound, KEYS[user], "POST", path, {"question": state["question"]["id"], "choice": "first"})
        assert (reply.status, reply.json["num_answered"]) == (200, 1)
        assert bound.store is not None
        assert bound.store.answers.count(user) == 1
        assert ask(bound, KEYS[user], "DELETE", f"{path}/last").status == 200
        assert ask(bound, KEYS[user], "DELETE", path).status == 204


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "POST"])
@pytest.mark.parametrize("rest", ["", "/questions", "/questions/last", "/questions/finish", "?version=1"])
def test_no_path_leads_to_another_user(bound: RunningServer, method: str, rest: str) -> None:
    assert bound.store is not None
    before = list(bound.store.all())
    body = {"weights": {"warm": 1.0}} if method in {"PUT", "POST"} else None
    for key_user in USERS:
        for user in (*USERS, "someone new"):
            # paths of other users, as clients write them and as they may be written to mislead
            paths = [path_of(user, rest), f"/v1/profiles/{quote(user)}{rest}"]
            for path in paths:
                reply = ask(bound, KEYS[key_user], method, path, body)
                if is_of(path, key_user):
                    assert reply.status != 403, (key_user, path)
                    if reply.status in {200, 201, 204}:
                        restore(bound, before)
                else:
                    check_refused(reply)
                    assert list(bound.store.all()) == before


def is_of(path: str, user: str) -> bool:
    """Return whether a path belongs to a user, by the rule of the documentation.

    A path that ends in `/questions`, `/questions/last` or `/questions/finish` as it is sent names the questions of the
    user before it. Everything else is a name.
    """
    rest = path.partition("?")[0].removeprefix("/v1/profiles/")
    for ending in ("/questions/last", "/questions/finish", "/questions"):
        if rest.endswith(ending):
            return rest.removesuffix(ending) in {quote(user), quote(user, safe="")}
    return rest in {quote(user), quote(user, safe="")}


def restore(served: RunningServer, before: list[Any]) -> None:
    """Write back what a request of the right user changed, so that every request meets the same store."""
    assert served.store is not None
    for stored in before:
        served.store.put(stored.profile)
    for stored in list(served.store.all()):
        if stored.profile.user not in [each.profile.user for each in before]:
            served.store.delete(stored.profile.user)
    for user in USERS:
        served.store.answers.delete(user)
    before[:] = list(served.store.all())


def test_a_bound_key_uses_its_own_soup_the_base_and_inline_profiles(bound: RunningServer) -> None:
    for user in USERS[:-1]:
        version = ask(bound, FULL, "GET", path_of(user)).json["version"]
        reply = chat(bound, KEYS[user], f"soup:{user}@{version}")
        assert (reply.status, reply.json["model"]) == (200, f"soup:{user}@{version}")
    assert chat(bound, KEYS["ada/questions"], "soup:ada/questions").status == 200
    # a name that ends in @ and digits needs a version: without it, the model is a version of another user's profile
    check_refused(chat(bound, KEYS["ada@1"], "soup:ada@1"))
    assert chat(bound, KEYS["ada"], "small").json["model"] == "small"
    inline = chat(bound, KEYS["ada"], "small", profile={"weights": {"warm": 1.0}}, user="bob")
    assert inline.status == 200
    assert ask(bound, KEYS["ada"], "GET", "/v1/models/soup:ada").json["id"] == "soup:ada"


@pytest.mark.parametrize(
    "model",
    ["soup:bob", "soup:bob@1", "soup:ada@1@1", "soup:someone new", "soup:", "soup:ada ", "soup:ADA", "soup:ada\n"],
)
def test_a_bound_key_uses_no_other_soup(bound: RunningServer, model: str) -> None:
    key = KEYS["ada"]
    check_refused(chat(bound, key, model))
    check_refused(chat(bound, key, model, stream=True))
    check_refused(ask(bound, key, "POST", "/v1/completions", {"model": model, "prompt": "x", "max_tokens": 1}))
    check_refused(ask(bound, key, "GET", f"/v1/models/{quote(model)}"))


def test_a_repeated_key_in_the_body_names_no_other_soup(bound: RunningServer) -> None:
    data = (
        b'{"model": "soup:ada", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "model": "soup:bob"}'
    )
    assert ask(bound, KEYS["ada"], "POST", "/v1/chat/completions", data).status in {400, 403}


def test_the_list_of_models_names_no_other_user(bound: RunningServer) -> None:
    def listed(key: str) -> list[str]:
        return [each["id"] for each in ask(bound, key, "GET", "/v1/models").json["data"]]

    assert listed(KEYS["ada"]) == ["small", "soup:ada"]
    assert listed(KEYS["nobody"]) == ["small"]
    assert {"soup:ada", "soup:bob"} <= set(listed(FULL))


# What a bound key may use, by method and route. Every other route of the server must refuse it.
OPEN = {"/", "/health", "/ready", "/favicon.ico", "/openapi.json", "/playground"}
OWN = "/v1/profiles/{user:any}"
ALLOWED = {
    ("POST", "/v1/chat/completions"): {"model": "soup:bob", "messages": [{"role": "user", "content": "x"}]},
    ("POST", "/v1/completions"): {"model": "soup:bob", "prompt": "x"},
    ("GET", "/v1/models"): None,
    ("GET", "/v1/models/{model:any}"): None,
    ("GET", "/v1/experts"): None,
    ("POST", "/v1/scores"): {"prompt": "x", "answers": ["y"]},
}


def routes_of(served: RunningServer) -> list[tuple[str, str]]:
    """Return the method and path of every route of the application, also of those that the schema leaves out."""
    paths = served.server._guard._app
    assert isinstance(paths, UserPaths)
    api = paths._app
    assert isinstance(api, FastAPI)
    found: list[tuple[str, str]] = []
    for route in flat(api.routes):
        assert isinstance(route, Route | Mount)
        methods = sorted(route.methods or ()) if isinstance(route, Route) else ["GET"]
        found += [(method, route.path) for method in methods]
    return found


def flat(routes: Sequence[BaseRoute]) -> Iterator[BaseRoute]:
    """Yield the routes, and those of included routers, which newer versions of FastAPI keep as they are."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from flat(router.routes)


def test_every_route_refuses_a_bound_key_or_shows_only_its_own_user(bound: RunningServer) -> None:
    assert bound.store is not None
    routes = routes_of(bound)
    documented = bound.ask("GET", "/openapi.json").json["paths"]
    assert len(routes) > 20
    for path, methods in documented.items():
        known = {(method, route.replace(":any}", "}")) for method, route in routes}
        assert {(method.upper(), path) for method in methods} <= known
    bound.store.answers.add("bob", answered("q-of-bob"))
    before = [list(bound.store.all()), bound.store.answers.of("bob")]
    secrets = [f"{MARKS['bob']}", "bob", "q-of-bob", "Countess"]
    num_allowed = 0
    for method, route in routes:
        if route in OPEN:
            continue
        path = route.replace("{user:any}", "bob").replace("{model:any}", "soup:bob")
        body = ALLOWED.get((method, route)) or ({} if method in {"POST", "PUT"} else None)
        reply = ask(bound, KEYS["ada"], method, path, body)
        if (method, route) in ALLOWED and reply.status != 403:
            num_allowed += 1
            assert not any(secret in reply.body.decode() for secret in secrets), (method, route)
        else:
            check_refused(reply)
        assert [list(bound.store.all()), bound.store.answers.of("bob")] == before, (method, route)
    assert num_allowed == 3  # the lists of models and experts, and the scores; the others name bob's soup
    bound.store.answers.delete("bob")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/profiles"), ("GET", "/v1/profiles?search=bob"), ("POST", "/v1/experts/reload"),
        ("GET", "/metrics"), ("GET", "/v1/nothing"), ("GET", "/docs"), ("DELETE", "/v1/models/soup:ada"),
        ("GET", "/V1/profiles/ada"), ("GET", "//v1/profiles/bob"), ("GET", "/v1//profiles/bob"),
        ("PATCH", "/v1/experts"),
    ],
)  # fmt: skip
def test_what_is_not_about_one_user_is_refused(bound: RunningServer, method: str, path: str) -> None:
    check_refused(ask(bound, KEYS["ada"], method, path, {} if method in {"POST", "PATCH"} else None))


def test_a_key_with_full_access_may_do_all(bound: RunningServer) -> None:
    assert ask(bound, FULL, "GET", "/v1/profiles").status == 200
    assert ask(bound, FULL, "GET", "/metrics").status == 200
    for user in USERS[:-1]:
        assert ask(bound, FULL, "GET", path_of(user)).status == 200
    assert ask(bound, "another-key-that-nobody-knows", "GET", path_of("ada")).status == 401
    assert bound.ask("GET", path_of("ada")).status == 401
    assert bound.ask("GET", "/health").status == 200
