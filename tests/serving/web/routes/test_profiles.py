"""/v1/profiles over the wire: versions as ETags, conditions, names of every kind, and a database that fails."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import event

from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.settings import Settings
from tests.serving.servers import RunningServer, running

WEIGHTS = {"weights": {"warm": 0.5}}
OTHERS = {"weights": {"cold": -1.25}}


def _at(user: str) -> str:
    return f"/v1/profiles/{quote(user, safe='')}"


def test_a_profile_is_put_read_replaced_listed_and_erased(served: RunningServer) -> None:
    made = served.ask("PUT", _at("u1"), WEIGHTS)
    version = made.json["version"]
    assert (made.status, made.headers["etag"]) == (201, f'"{version}"')
    assert made.json["profile"] == {"user": "u1", **WEIGHTS}
    again = served.ask("PUT", _at("u1"), {"user": "u1", **OTHERS})
    assert (again.status, again.headers["etag"]) == (200, f'"{version + 1}"')
    assert served.ask("GET", _at("u1")).json == again.json
    assert served.ask("GET", _at("u1") + f"?version={version}").json == made.json
    history = served.ask("GET", _at("u1") + "?history=true").json["data"]
    assert history == [made.json, again.json]
    assert "u1" in [each["user"] for each in served.ask("GET", "/v1/profiles").json["data"]]
    assert served.ask("DELETE", _at("u1")).status == 204
    for path in (_at("u1"), _at("u1") + f"?version={version}", _at("u1") + "?history=true"):
        gone = served.ask("GET", path)
        assert (gone.status, gone.error["code"]) == (404, "profile_not_found")
    assert served.ask("DELETE", _at("u1")).status == 404
    assert served.ask("PUT", _at("u1"), WEIGHTS).json["version"] > version + 1  # never the same version twice


def test_conditions_keep_writers_from_each_other(served: RunningServer) -> None:
    assert served.ask("PUT", _at("c"), WEIGHTS, {"If-Match": "*"}).status == 412
    first = served.ask("PUT", _at("c"), WEIGHTS, {"If-None-Match": "*"}).headers["etag"]
    taken = served.ask("PUT", _at("c"), OTHERS, {"If-None-Match": "*"})
    assert (taken.status, taken.error["code"]) == (412, "version_conflict")
    second = served.ask("PUT", _at("c"), OTHERS, {"If-Match": first})
    assert second.status == 200
    late = served.ask("PUT", _at("c"), WEIGHTS, {"If-Match": first})
    assert (late.status, late.headers["etag"]) == (412, second.headers["etag"])
    assert served.ask("PUT", _at("c"), WEIGHTS, {"If-Match": f'"77", {second.headers["etag"]}'}).status == 200
    assert served.ask("PUT", _at("c"), OTHERS, {"If-Match": "*"}).status == 200
    now = served.ask("GET", _at("c")).headers["etag"]
    for odd in (f"W/{now}", now.strip('"'), "7", '"x"', ""):
        assert served.ask("PUT", _at("c"), WEIGHTS, {"If-Match": odd}).status == 412
    assert served.ask("PUT", _at("c"), WEIGHTS, {"If-None-Match": '"3"'}).status == 400
    now = served.ask("GET", _at("c")).headers["etag"]
    unchanged = served.ask("GET", _at("c"), headers={"If-None-Match": f"W/{now}"})
    assert (unchanged.status, unchanged.body, unchanged.headers["etag"]) == (304, b"", now)
    assert served.ask("GET", _at("c"), headers={"If-None-Match": first}).status == 200
    assert served.ask("DELETE", _at("c"), headers={"If-Match": first}).status == 412
    assert served.ask("DELETE", _at("c"), headers={"If-Match": now}).status == 204


def test_no_update_of_many_writers_is_lost(served: RunningServer) -> None:
    served.ask("PUT", _at("counter"), {"weights": {"warm": 0.5}})

    def add(_: int) -> None:
        while True:
            seen = served.ask("GET", _at("counter"))
            weight = seen.json["profile"]["weights"]["warm"] + 1
            reply = served.ask("PUT", _at("counter"), {"weights": {"warm": weight}}, {"If-Match": seen.headers["etag"]})
            if reply.status == 200:
                return
            assert reply.status == 412

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add, range(18)))
    assert served.ask("GET", _at("counter")).json["profile"]["weights"]["warm"] == 18.5


NAMES = [
    "a/b", "/", "//x//", "..", "../../etc/passwd", ".", "u1042@7", "soup:x", "x?y=1#z", "100%", "%2F", "a b", "+",
    "'; DROP TABLE profiles; --", '" OR 1=1', "\\", "\n\r\t\x01\x7f", "😀\U0001d518", "\u202eabc", "é", "e\u0301",
    "null", "x" * 256,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_may_be_any_text(served: RunningServer, name: str) -> None:
    made = served.ask("PUT", _at(name), WEIGHTS)
    assert made.status == 201
    assert made.json["user"] == name
    assert served.ask("GET", _at(name)).json["profile"]["user"] == name
    assert name in [each["user"] for each in served.ask("GET", "/v1/profiles?limit=1000").json["data"]]
    model = f"soup:{name}@{made.json['version']}"
    body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = served.ask("POST", "/v1/chat/completions", body)
    assert (answer.status, answer.json["model"]) == (200, model)
    assert served.ask("DELETE", _at(name)).status == 204


@pytest.mark.parametrize("name", ["\x00", "a\x00b", "x" * 257, "é" * 129])
def test_names_that_cannot_be_kept_are_refused(served: RunningServer, name: str) -> None:
    reply = served.ask("PUT", _at(name), WEIGHTS)
    assert (reply.status, reply.error["param"]) == (400, "user")


def test_a_page_of_profiles_says_whether_there_are_more(served: RunningServer) -> None:
    for place in range(5):
        served.ask("PUT", _at(f"zz{place}"), WEIGHTS)
    page = served.ask("GET", "/v1/profiles?after=zz0&limit=2").json
    assert ([each["user"] for each in page["data"]], page["has_more"]) == (["zz1", "zz2"], True)
    rest = served.ask("GET", "/v1/profiles?after=zz2&limit=1000").json
    assert ([each["user"] for each in rest["data"]], rest["has_more"]) == (["zz3", "zz4"], False)
    found = served.ask("GET", "/v1/profiles?search=Z2&limit=1").json
    assert [[each["user"] for each in found["data"]], found["has_more"]] == [["zz2"], False]
    found = served.ask("GET", "/v1/profiles?search=zZ&after=zz0&limit=1").json
    assert [[each["user"] for each in found["data"]], found["has_more"]] == [["zz1"], True]
    assert served.ask("GET", "/v1/profiles?search=%00").json["data"] == []
    assert served.ask("GET", f"/v1/profiles?search={'x' * 257}").status == 400
    for odd in ("limit=0", "limit=1001", "limit=x"):
        assert served.ask("GET", f"/v1/profiles?{odd}").status == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"weights": {"wam": 1}}, 422),
        ({"weights": {"warm": 1}, "method": "ties"}, 422),
        ({"weights": {"warm": 1}, "rank": 4}, 422),
        ({"weights": {"warm": 1e29}}, 201),
        ({"weights": {}}, 400),
        ({"weights": {"warm": 0}}, 400),
        ({"weights": {"warm": "much"}}, 400),
        ({"weights": {"warm": 1}, "user": "somebody else"}, 400),
        ({"weights": {"warm": 1}, "colour": "red"}, 400),
        (b'{"weights": {"warm": NaN}}', 400),
        (b'{"weights": {"warm": Infinity}}', 400),
        (b'{"weights": {"warm": 1e400}}', 400),
        (b"[]", 400),
        (b"", 400),
    ],
)
def test_what_is_no_profile_is_400_and_what_can_not_be_served_422(
    served: RunningServer, body: object, status: int
) -> None:
    reply = served.ask("PUT", _at("odd"), body)
    assert reply.status == status
    if status != 201:
        assert reply.error["message"]
        assert served.ask("GET", _at("odd")).status == 404
    else:
        served.ask("DELETE", _at("odd"))


def test_a_body_that_is_no_object_is_no_parameters_fault(served: RunningServer) -> None:
    reply = served.ask("PUT", _at("odd"), b"[]")
    assert (reply.status, reply.error["param"]) == (400, None)
    assert served.ask("GET", "/v1/profiles?limit=0").error["param"] == "limit"


def test_numbers_that_are_no_json_are_told_as_such(served: RunningServer) -> None:
    for number in (b"NaN", b"Infinity", b"-Infinity"):
        reply = served.ask("PUT", _at("odd"), b'{"weights": {"warm": %s}}' % number)
        assert (reply.status, reply.error["code"]) == (400, "invalid_json")


def test_a_profile_is_served_as_it_is_now(served: RunningServer) -> None:
    body = {
        "model": "soup:now",
        "messages": [{"role": "user", "content": "wash it"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    said = []
    for weights in ({"warm": 1.5}, {"plain": 2.0}):
        served.ask("PUT", _at("now"), {"weights": weights})
        said.append(served.ask("POST", "/v1/chat/completions", body).json["choices"][0]["message"]["content"].strip())
        assert said[-1] == served.model.generate(["wash it"], [weights], max_new_tokens=8)[0]
    assert said[0] != said[1]


@pytest.fixture
def failing(small_base: Path, expert_folders: Path, tmp_path: Path) -> Iterator[tuple[RunningServer, Path]]:
    path = tmp_path / "kept" / "profiles.db"
    path.parent.mkdir()
    settings = Settings("small", limits=Limits(max_context=256))
    with running(small_base, expert_folders, settings, profiles=path) as served:
        served.ask("PUT", _at("u"), WEIGHTS)
        yield served, path


def test_a_database_that_goes_away_is_told_and_found_again(failing: tuple[RunningServer, Path]) -> None:
    served, path = failing
    away = path.parent.with_name("away")
    path.parent.rename(away)
    for method, body in (("GET", None), ("PUT", OTHERS), ("DELETE", None)):
        reply = served.ask(method, _at("u"), body)
        assert (reply.status, reply.error["code"]) == (503, "store_unavailable")
        assert str(path.parent) not in reply.body.decode()
        assert int(reply.headers["retry-after"]) >= 1
    assert served.ask("GET", "/ready").status == 503
    asked = {"model": "soup:u", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert served.ask("POST", "/v1/chat/completions", asked).status == 503
    assert served.ask("POST", "/v1/chat/completions", {**asked, "model": "small"}).status == 200
    away.rename(path.parent)
    assert served.ask("GET", "/ready").status == 200
    assert served.ask("GET", _at("u")).json["profile"]["weights"] == WEIGHTS["weights"]
    assert served.ask("POST", "/v1/chat/completions", asked).status == 200


def test_a_full_disk_is_told_and_loses_nothing(failing: tuple[RunningServer, Path]) -> None:
    served, _ = failing
    assert served.store is not None

    def no_more(connection: sqlite3.Connection, *_: object) -> None:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")

    pool = served.store._database.engine.pool
    event.listen(pool, "checkout", no_more)
    try:
        replies = [
            served.ask("PUT", _at(f"user{place}" * 20), {"weights": {"warm": 0.1 * place}}) for place in range(1, 200)
        ]
        assert {reply.status for reply in replies} == {201, 507}
        assert replies[-1].error["code"] == "store_full"
        kept = sum(reply.status == 201 for reply in replies)
        assert len(served.ask("GET", "/v1/profiles?limit=1000").json["data"]) == kept + 1
    finally:
        event.remove(pool, "checkout", no_more)
    assert served.ask("GET", _at("u")).json["profile"]["weights"] == WEIGHTS["weights"]


def test_without_a_store_that_is_said(small_base: Path, expert_folders: Path) -> None:
    with running(small_base, expert_folders, Settings("small", limits=Limits(max_context=256))) as served:
        for method, path in (("GET", "/v1/profiles"), ("GET", _at("u")), ("PUT", _at("u")), ("DELETE", _at("u"))):
            reply = served.ask(method, path, WEIGHTS if method == "PUT" else None)
            assert (reply.status, reply.error["code"]) == (404, "no_store")
            assert "without a profile store" in reply.error["message"]
        asked = {"model": "soup:u", "messages": [{"role": "user", "content": "x"}]}
        assert "without a profile store" in served.ask("POST", "/v1/chat/completions", asked).error["message"]
        assert json.loads(served.ask("GET", "/v1/models").body)["data"][0]["id"] == "small"
