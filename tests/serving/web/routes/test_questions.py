"""/v1/profiles/{user}/questions over the wire: asked, answered, repeated, taken back, erased, written as a profile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from personalized_soups.declare.profile import Profile
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.settings import Settings
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.answers.session import InferenceSession
from tests.experts import write_expert
from tests.mixing.worlds import write_experts
from tests.serving.servers import Reply, RunningServer, running
from tests.serving.web.routes.pools import pool_of

WARM = np.array([-2.0, 0.0, 2.0])  # of cold, plain and warm


@pytest.fixture(scope="module")
def pool(expert_folders: Path) -> QuestionPool:
    return pool_of(expert_folders)


@pytest.fixture(scope="module")
def asking(
    small_base: Path, expert_folders: Path, pool: QuestionPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    store = tmp_path_factory.mktemp("store") / "profiles.db"
    settings = Settings("small", limits=Limits(max_context=256), answers_per_minute=10_000)
    with running(small_base, expert_folders, settings, profiles=store, pool=pool) as found:
        yield found


def _at(user: str, rest: str = "") -> str:
    return f"/v1/profiles/{quote(user, safe='')}/questions{rest}"


def _answer(served: RunningServer, user: str, question: str, choice: str, query: str = "") -> Reply:
    return served.ask("POST", _at(user, query), {"question": question, "choice": choice})


def _choose(pool: QuestionPool, question: dict[str, Any], weights: Any = WARM) -> str:
    """Return the shown answer with the greater reward, found by its text."""
    index = int(question["id"].rpartition("-")[2])
    rewards = {pool.questions[index].a: pool.a[index] @ weights, pool.questions[index].b: pool.b[index] @ weights}
    first, second = (rewards[text] for text in question["answers"])
    return "first" if first > second else "second"


def _answer_all(served: RunningServer, user: str, choose: Callable[[dict[str, Any]], str], query: str = "") -> Any:
    state = served.ask("GET", _at(user, query)).json
    while not state["done"]:
        reply = _answer(served, user, state["question"]["id"], choose(state["question"]), query)
        assert reply.status == 200
        state = reply.json
    return state


# ---- asking ---------------------------------------------------------------------------------------------------------


def test_ten_answers_give_a_profile_that_is_written_and_served(asking: RunningServer, pool: QuestionPool) -> None:
    state = _answer_all(asking, "ada", lambda question: _choose(pool, question))
    assert (state["num_answered"], state["num_questions"], state["question"]) == (10, 10, None)
    estimate = state["estimate"]
    temper = next(each for each in estimate["preferences"] if each["dimension"] == "temper")
    assert (temper["preferred"], temper["other"], temper["certainty"]) == ("warm", "cold", "clear")
    assert temper["interval"][0] < temper["strength"] < temper["interval"][1]
    assert "You prefer warm" in estimate["sentence"]
    assert estimate["num_answers"] == 10
    assert 0.8 < estimate["agreement"] < 1
    assert "cold" not in estimate["profile"]["weights"]
    written = asking.ask("POST", _at("ada", "/finish"))
    assert (written.status, written.json["profile"]) == (201, estimate["profile"])
    assert asking.ask("GET", "/v1/profiles/ada").json == written.json
    body = {"model": "soup:ada", "messages": [{"role": "user", "content": "wash it"}], "max_tokens": 2}
    assert asking.ask("POST", "/v1/chat/completions", body).status == 200


def test_the_questions_and_the_estimate_are_those_of_the_session(asking: RunningServer, pool: QuestionPool) -> None:
    session = InferenceSession(pool, "bo")
    state = asking.ask("GET", _at("bo")).json
    for number, choice in enumerate(["first", "second", "tie", "skip", "second"], 1):
        shown = session.next
        assert shown is not None
        question = shown.question
        texts = [question.b, question.a] if shown.swapped else [question.a, question.b]
        assert state["question"] == {
            "object": "question", "id": question.id, "number": number, "prompt": question.prompt, "answers": texts,
        }  # fmt: skip
        chosen = {"first": texts[0], "second": texts[1]}.get(choice)
        stored: Any = choice if chosen is None else "a" if chosen == question.a else "b"
        session = session.answered(question.id, stored)
        state = _answer(asking, "bo", question.id, choice).json
        assert state["last_answered"] == question.id
    direction = np.array([-1.0, 0.0, 1.0]) * (1 if session.estimate.mean[2] > session.estimate.mean[0] else -1)
    temper = next(each for each in state["estimate"]["preferences"] if each["dimension"] == "temper")
    # Both sides compute the same numbers. JSON keeps every bit of a float64.
    assert temper["strength"] == pytest.approx(float(direction @ session.estimate.mean), rel=1e-12)
    assert temper["interval"] == pytest.approx(session.estimate.interval(direction), rel=1e-12)
    assert state["estimate"]["num_answers"] == 4
    assert state["estimate"]["agreement"] == pytest.approx(session.agreement, rel=1e-12)
    assert asking.ask("GET", _at("bo")).json == state
    assert asking.store is not None
    kept = [(each.question, each.answer.choice, each.answer.swapped) for each in asking.store.answers.of("bo")]
    assert kept == [(each.question, each.answer.choice, each.answer.swapped) for each in session.answers]


def test_nothing_is_known_before_the_first_answer(asking: RunningServer) -> None:
    state = asking.ask("GET", _at("nobody")).json
    assert (state["done"], state["num_answered"], state["question"]["number"]) == (False, 0, 1)
    assert state["last_answered"] is None
    assert state["estimate"]["profile"] is None
    assert state["estimate"]["sentence"].startswith("It is still open")
    for _ in range(6):
        state = _answer(asking, "nobody", state["question"]["id"], "skip").json
    assert any("nothing is known" in note for note in state["estimate"]["notes"])
    refused = asking.ask("POST", _at("nobody", "/finish"))
    assert (refused.status, refused.error["code"]) == (422, "no_preference")
    assert asking.ask("GET", "/v1/profiles/nobody").status == 404


def test_who_always_presses_first_is_told(asking: RunningServer) -> None:
    state = _answer_all(asking, "lefty", lambda _: "first")
    assert any("first answer all 10 times" in note for note in state["estimate"]["notes"])


def test_more_questions_may_be_asked(asking: RunningServer, pool: QuestionPool) -> None:
    _answer_all(asking, "curious", lambda question: _choose(pool, question))
    more = asking.ask("GET", _at("curious", "?num_questions=15")).json
    assert (more["done"], more["num_questions"], more["question"]["number"]) == (False, 15, 11)
    state = _answer_all(asking, "curious", lambda question: _choose(pool, question), "?num_questions=15")
    assert (state["num_answered"], state["done"]) == (15, True)
    assert asking.ask("GET", _at("curious")).json["done"]
    every = _answer_all(asking, "curious", lambda _: "skip", "?num_questions=1000")
    assert (every["num_answered"], every["num_questions"], every["estimate"]["agreement"]) == (40, 40, None)
    for odd in ("0", "1001", "x"):
        assert asking.ask("GET", _at("curious", f"?num_questions={odd}")).status == 400


def test_certainty_ends_the_questions_early(
    small_base: Path, expert_folders: Path, pool: QuestionPool, tmp_path: Path
) -> None:
    settings = Settings("small", limits=Limits(max_context=256), num_questions=30, certainty=0.75)
    with running(small_base, expert_folders, settings, profiles=tmp_path / "p.db", pool=pool) as served:
        state = served.ask("GET", _at("sure")).json
        agreements = []
        while not state["done"]:
            state = _answer(served, "sure", state["question"]["id"], _choose(pool, state["question"])).json
            agreements.append(state["estimate"]["agreement"])
        assert 3 <= len(agreements) < 30
        assert all(each < 0.75 for each in agreements[2:-1])
        assert agreements[-1] >= 0.75
        assert not served.ask("GET", _at("sure", "?num_questions=30")).json["done"]


# ---- answering twice, or out of turn --------------------------------------------------------------------------------


def test_an_answer_may_be_repeated_but_not_changed(asking: RunningServer) -> None:
    assert asking.store is not None
    kinds, choices = set(), ("first", "second", "tie", "skip")
    for number in range(8):
        for choice in choices[:3]:
            user = f"twice {number} {choice}"
            question = asking.ask("GET", _at(user)).json["question"]["id"]
            once = _answer(asking, user, question, choice)
            assert _answer(asking, user, question, choice).json == once.json
            for other in set(choices) - {choice}:
                refused = _answer(asking, user, question, other)
                assert (refused.status, refused.error["code"]) == (409, "already_answered")
            assert asking.ask("GET", _at(user)).json == once.json
            (stored,) = asking.store.answers.of(user)
            kinds.add((stored.answer.choice, stored.answer.swapped))
    assert len(kinds) == 6  # both orders of the answers


def test_a_question_that_was_not_asked_has_no_answer(asking: RunningServer, pool: QuestionPool) -> None:
    current = asking.ask("GET", _at("eager")).json["question"]["id"]
    another = next(each.id for each in pool.questions if each.id != current)
    for question in (another, "nothing", ""):
        refused = _answer(asking, "eager", question, "first")
        assert (refused.status, refused.error["code"]) == (409, "not_asked")
    assert asking.ask("GET", _at("eager")).json["num_answered"] == 0


@pytest.mark.parametrize(
    "body",
    [
        {"question": "q0-1"}, {"choice": "first"}, {"question": "q0-1", "choice": "a"},
        {"question": 1, "choice": "tie"}, {"question": "q0-1", "choice": "tie", "user": "x"},
        {"question": "q" * 65, "choice": "tie"}, [], b"{", b"",
    ],
)  # fmt: skip
def test_what_is_no_answer_is_400(asking: RunningServer, body: Any) -> None:
    assert asking.ask("POST", _at("odd"), body).status == 400
    assert asking.ask("GET", _at("odd")).json["num_answered"] == 0


def test_of_two_terminals_at_once_one_answer_counts(asking: RunningServer) -> None:
    question = asking.ask("GET", _at("both")).json["question"]["id"]
    choices = ["first", "second"] * 8
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda choice: _answer(asking, "both", question, choice), choices))
    assert {reply.status for reply in replies} == {200, 409}
    won = {choice for choice, reply in zip(choices, replies, strict=True) if reply.status == 200}
    assert len(won) == 1
    state = asking.ask("GET", _at("both")).json
    assert state["num_answered"] == 1
    assert all(reply.json == state for reply in replies if reply.status == 200)


def test_the_last_answer_is_taken_back_once(asking: RunningServer) -> None:
    states = [asking.ask("GET", _at("back")).json]
    for choice in ("first", "tie"):
        states.append(_answer(asking, "back", states[-1]["question"]["id"], choice).json)
    one, two = (state["question"]["id"] for state in states[:2])
    refused = asking.ask("DELETE", _at("back", f"/last?question={one}"))
    assert (refused.status, refused.error["code"]) == (409, "not_last")
    for _ in range(2):  # the second one is a repeated request
        assert asking.ask("DELETE", _at("back", f"/last?question={two}")).json == states[1]
    assert asking.ask("DELETE", _at("back", "/last")).json == states[0]
    refused = asking.ask("DELETE", _at("back", "/last"))
    assert (refused.status, refused.error["code"]) == (404, "no_answers")
    assert _answer(asking, "back", one, "second").status == 200


def test_answers_are_erased_and_the_profile_stays(asking: RunningServer) -> None:
    asking.ask("PUT", "/v1/profiles/gone", {"weights": {"warm": 0.5}})
    _answer(asking, "gone", asking.ask("GET", _at("gone")).json["question"]["id"], "first")
    for _ in range(2):
        assert asking.ask("DELETE", _at("gone")).status == 204
    assert asking.ask("GET", _at("gone")).json["num_answered"] == 0
    assert asking.ask("GET", "/v1/profiles/gone").status == 200
    _answer(asking, "gone", asking.ask("GET", _at("gone")).json["question"]["id"], "first")
    assert asking.ask("DELETE", "/v1/profiles/gone").status == 204
    assert asking.ask("GET", _at("gone")).json["num_answered"] == 0  # they are deleted with the user


def test_finishing_writes_the_next_version_under_the_conditions_of_profiles(
    asking: RunningServer, pool: QuestionPool
) -> None:
    made = asking.ask("PUT", "/v1/profiles/cond", {"weights": {"plain": 1}})
    first, version = made.headers["etag"], made.json["version"] + 1
    _answer_all(asking, "cond", lambda question: _choose(pool, question))
    assert asking.ask("POST", _at("cond", "/finish"), headers={"If-None-Match": "*"}).status == 412
    assert asking.ask("POST", _at("cond", "/finish"), headers={"If-Match": '"77"'}).status == 412
    written = asking.ask("POST", _at("cond", "/finish"), headers={"If-Match": first})
    assert (written.status, written.json["version"], written.headers["etag"]) == (200, version, f'"{version}"')
    assert asking.ask("POST", _at("cond", "/finish")).json["version"] == version  # the same profile is no new version


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user", ["a/questions", "a/questions/last", "a/questions/finish", "questions", "/", "é 😀\n", "%"]
)
def test_users_of_every_name_have_questions_and_a_profile(asking: RunningServer, user: str) -> None:
    profile = f"/v1/profiles/{quote(user, safe='')}"
    assert asking.ask("PUT", profile, {"weights": {"warm": 0.5}}).json["user"] == user
    state = asking.ask("GET", _at(user)).json
    assert (state["user"], state["num_answered"]) == (user, 0)
    assert _answer(asking, user, state["question"]["id"], "first").json["num_answered"] == 1
    assert asking.ask("GET", _at("a")).json["num_answered"] == 0
    assert asking.ask("GET", profile).json["profile"]["weights"] == {"warm": 0.5}
    assert asking.ask("DELETE", _at(user, "/last")).json["num_answered"] == 0
    assert asking.ask("DELETE", profile).status == 204


@pytest.mark.parametrize("user", ["", "a\x00b", "x" * 257])
def test_names_that_cannot_be_kept_are_refused(asking: RunningServer, user: str) -> None:
    for reply in (asking.ask("GET", _at(user)), _answer(asking, user, "q0-1", "tie"), asking.ask("DELETE", _at(user))):
        assert (reply.status, reply.error["param"]) == (400, "user")


def test_a_path_of_questions_is_never_a_profile(asking: RunningServer) -> None:
    for method, rest, allowed in (
        ("PUT", "", "GET, POST, DELETE"), ("GET", "/last", "DELETE"), ("PUT", "/last", "DELETE"),
        ("GET", "/finish", "POST"), ("PUT", "/finish", "POST"), ("DELETE", "/finish", "POST"),
    ):  # fmt: skip
        reply = asking.ask(method, _at("p", rest), {"weights": {"warm": 1}} if method == "PUT" else None)
        assert (reply.status, reply.headers["allow"]) == (405, allowed)
    odd = asking.ask("POST", "/v1/profiles/p%2Fquestions", {"question": "q", "choice": "tie"})
    assert odd.status == 405
    assert odd.error["message"] == "The method POST is not allowed for /v1/profiles/p/questions"


# ---- limits, faults, and what is told -------------------------------------------------------------------------------


def test_a_user_who_answers_too_fast_waits_and_others_do_not(
    small_base: Path, expert_folders: Path, pool: QuestionPool, tmp_path: Path
) -> None:
    settings = Settings("small", limits=Limits(max_context=256), answers_per_minute=2)
    with running(small_base, expert_folders, settings, profiles=tmp_path / "p.db", pool=pool) as served:
        question = served.ask("GET", _at("fast")).json["question"]["id"]
        replies = [_answer(served, "fast", question, "tie") for _ in range(3)]
        assert [reply.status for reply in replies] == [200, 200, 429]
        assert replies[2].error["code"] == "too_many_answers"
        assert 1 <= int(replies[2].headers["retry-after"]) <= 30
        assert served.ask("DELETE", _at("fast")).status == 429
        assert served.ask("GET", _at("fast")).status == 200
        assert _answer(served, "slow", question, "tie").status == 200


def test_questions_of_other_experts_are_refused_until_the_experts_are_back(
    small_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "experts"
    write_experts(folder)
    pool = pool_of(folder)
    warm = (folder / "warm").rename(tmp_path / "warm")
    settings = Settings("small", limits=Limits(max_context=256))

    def check(status: int) -> Reply:
        replies = [
            served.ask("GET", _at("u")), _answer(served, "u", "q0-1", "tie"), served.ask("DELETE", _at("u", "/last")),
            served.ask("POST", _at("u", "/finish")),
        ]  # fmt: skip
        assert all((reply.status, reply.error["code"]) == (409, "experts_changed") for reply in replies)
        return replies[0]

    with (
        caplog.at_level(logging.ERROR),
        running(small_base, folder, settings, profiles=tmp_path / "p.db", pool=pool) as served,
    ):
        message = check(409).error["message"]
        assert "warm missing" in message
        assert "psoups questions make" in message
        assert str(tmp_path) not in message
        assert "warm missing; make the questions again with these experts" in caplog.text
        write_expert(folder / "warm", seed=77)
        assert served.ask("POST", "/v1/experts/reload").status == 200
        assert "warm changed" in check(409).error["message"]
        assert served.ask("GET", "/health").status == 200
        (folder / "warm").rename(tmp_path / "another")
        warm.rename(folder / "warm")
        assert served.ask("POST", "/v1/experts/reload").status == 200
        assert served.ask("GET", _at("u")).status == 200


def test_answers_to_another_pool_are_refused_until_they_are_deleted(
    asking: RunningServer, expert_folders: Path
) -> None:
    session = InferenceSession(pool_of(expert_folders, seed=5), "old")
    assert session.next is not None
    assert asking.store is not None
    asking.store.answers.add("old", session.answered(session.next.question.id, "a").answers[0])
    refused = asking.ask("GET", _at("old"))
    assert (refused.status, refused.error["code"]) == (409, "other_questions")
    assert "delete the answers" in refused.error["message"]
    assert asking.ask("DELETE", _at("old")).status == 204
    assert asking.ask("GET", _at("old")).status == 200


def test_answers_are_neither_logged_nor_counted_by_name(
    asking: RunningServer, pool: QuestionPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "personalized_soups"):
        _answer_all(asking, "private person", lambda question: _choose(pool, question))
        asking.ask("DELETE", _at("private person", "/last"))
    assert "Prompt" not in caplog.text
    assert "private person" not in caplog.text
    text = asking.ask("GET", "/metrics").body.decode()
    assert "private" not in text
    for rest in ("", "/last"):
        assert f'psoups_requests_total{{route="/v1/profiles/{{user:any}}/questions{rest}",status="200"}}' in text


def test_without_questions_that_is_said(served: RunningServer) -> None:
    for method, rest in (("GET", ""), ("POST", ""), ("DELETE", ""), ("DELETE", "/last"), ("POST", "/finish")):
        reply = served.ask(method, _at("u", rest), {} if method == "POST" else None)
        assert (reply.status, reply.error["code"]) == (404, "no_questions")
    assert served.ask("GET", "/v1/experts").json["has_questions"] is False
    assert served.store is not None
    served.store.put(Profile(user="x/questions", weights={"warm": 1.0}))
    assert served.ask("GET", "/v1/profiles/x%2Fquestions").json["user"] == "x/questions"


def test_the_routes_are_described(asking: RunningServer) -> None:
    assert asking.ask("GET", "/v1/experts").json["has_questions"] is True
    described = asking.ask("GET", "/openapi.json").json
    path = "/v1/profiles/{user}/questions"
    methods = {rest: set(described["paths"][path + rest]) for rest in ("", "/last", "/finish")}
    assert methods == {"": {"get", "post", "delete"}, "/last": {"delete"}, "/finish": {"post"}}
    answer = described["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/QuestionsState"}
    body = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/AnswerRequest"}
