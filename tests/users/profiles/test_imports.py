"""Profiles and answers of many users in one transaction: all or nothing, and nothing twice."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from personalized_soups.declare.evidence import AnsweredQuestion, Choice, UserAnswers
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, UsageError
from personalized_soups.users.profiles import imports
from personalized_soups.users.profiles.answers import AnsweredOtherwise
from personalized_soups.users.profiles.store import Imported, ProfileStore
from tests.users.profiles.evidence import answered, time_of, timeless
from tests.users.profiles.test_concurrent import at_once
from tests.users.profiles.writers import profile_of

CHOICES: tuple[Choice, ...] = ("a", "b", "tie", "skip")


def line(user: str, *given: AnsweredQuestion) -> UserAnswers:
    return UserAnswers(user=user, answers=given)


def put(store: ProfileStore, lines: Sequence[Profile | UserAnswers], **options: Any) -> tuple[int, int]:
    """Import lines, and return the numbers of new versions and of new answers."""
    imported = store.put_lines(lines, **options)
    assert imported.num_profiles >= imported.num_versions
    assert imported.num_given >= imported.num_answers
    return imported.num_versions, imported.num_answers


def stored(store: ProfileStore) -> dict[str, list[AnsweredQuestion]]:
    return {user: [timeless(each) for each in store.answers.of(user)] for user in store.answers.users()}


@pytest.mark.parametrize("batch", [1, 2, 5000])
def test_profiles_and_answers_are_written_together(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(imports, "_BATCH", batch)
    time = datetime(2024, 5, 1, 12, 0, 0, 5, tzinfo=UTC)
    counts: list[int] = []
    lines: list[Profile | UserAnswers] = [
        profile_of("ada", 1),
        line("bob", answered("q2"), answered("q1", "tie", answered_at=time)),
        line("ada", answered("q9", "skip")),
        profile_of("eve", 2),
    ]
    assert put(store, lines, on_done=counts.append) == (2, 3)
    assert counts == sorted({*range(batch, 5, batch), 4})
    assert [each.profile.user for each in store.all()] == ["ada", "eve"]
    assert stored(store) == {"ada": [answered("q9", "skip")], "bob": [answered("q2"), answered("q1", "tie")]}
    second = store.answers.of("bob")[1]
    assert time_of(second) == time
    assert store.put_lines(lines) == Imported(num_profiles=2, num_versions=0, num_given=3, num_answers=0)


def test_new_answers_follow_the_stored_ones(store: ProfileStore) -> None:
    for question in ("q5", "q3"):
        store.answers.add("ada", answered(question))
    store.answers.add("bob", answered("q1"))
    imported = put(store, [line("ada", answered("q4"), answered("q3"), answered("q1"), answered("q2"))])
    assert imported == (0, 3)
    assert [each.question.id for each in store.answers.of("ada")] == ["q5", "q3", "q4", "q1", "q2"]
    assert store.answers.add("ada", answered("q0"), expected=5) == 6
    assert [each.question.id for each in store.answers.of("ada")][-1] == "q0"
    assert stored(store)["bob"] == [answered("q1")]


def test_a_differing_answer_stops_the_import(store: ProfileStore) -> None:
    store.answers.add("ada", answered("q1", "a"))
    store.answers.add("ada", answered("q2", "a"))
    before = stored(store)
    lines: list[Profile | UserAnswers] = [
        line("bob", answered("q1", "b")),
        line("ada", answered("q3"), answered("q2", "b")),
        profile_of("ada", 1),
    ]
    with pytest.raises(AnsweredOtherwise, match="another answer of 'ada' to the question 'q2' is stored"):
        store.put_lines(lines)
    assert (stored(store), store.page()) == (before, [])
    errors: list[str] = []
    assert put(store, lines, on_bad=lambda error: errors.append(error.what)) == (1, 2)
    assert errors == ["another answer of 'ada' to the question 'q2' is stored"]
    assert stored(store) == {
        "ada": [answered("q1"), answered("q2"), answered("q3")],
        "bob": [answered("q1", "b")],
    }


def test_a_differing_answer_is_replaced_in_its_place(store: ProfileStore) -> None:
    old = datetime(2024, 1, 1, tzinfo=UTC)
    for user in ("ada", "bob"):
        for question in ("q1", "q2", "q3"):
            store.answers.add(user, answered(question, "a", answered_at=old))
    new = datetime(2025, 1, 1, tzinfo=UTC)
    lines = [line("ada", answered("q3", "a"), answered("q2", "b", answered_at=new), answered("q4"))]
    assert put(store, lines, replace_answers=True) == (0, 2)
    assert stored(store)["ada"] == [answered("q1"), answered("q2", "b"), answered("q3"), answered("q4")]
    assert stored(store)["bob"] == [answered("q1"), answered("q2"), answered("q3")]
    assert [time_of(each) for each in store.answers.of("ada")[:3]] == [old, new, old]
    assert put(store, lines, replace_answers=True) == (0, 0)


def test_a_bad_line_leaves_nothing_written(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imports, "_BATCH", 2)
    good = [line(f"u{number}", answered("q1")) for number in range(5)]

    def broken() -> Iterator[UserAnswers]:
        yield from good
        raise DeclarationError("line 6 is at fault", where="users.jsonl:6", mend="fix it")

    with pytest.raises(DeclarationError, match="line 6"):
        store.put_lines(broken())
    with pytest.raises(UsageError, match="the user 'u1' has two lines of answers"):
        store.put_lines([*good, line("u1", answered("q2"))])
    with pytest.raises(DeclarationError, match="NUL"):
        store.put_lines([*good, line("u\0", answered("q2"))])
    assert stored(store) == {}
    errors: list[str] = []
    lines: list[Profile | UserAnswers] = [
        line("u\0", answered("q2")),
        *good,
        line("u1", answered("q2")),
        profile_of("u1", 1),
    ]
    assert put(store, lines, on_bad=lambda error: errors.append(error.what)) == (1, 5)
    assert errors == ["the user's name 'u\\x00' contains NUL", "the user 'u1' has two lines of answers"]
    assert stored(store) == {f"u{number}": [answered("q1")] for number in range(5)}


def test_a_future_time_is_stored_as_now(store: ProfileStore) -> None:
    future = datetime.now(UTC) + timedelta(days=400)
    store.put_lines([line("ada", answered("q1", answered_at=future))])
    assert time_of(store.answers.of("ada")[0]) <= datetime.now(UTC)


def test_an_import_and_sessions_at_once_lose_nothing(store: ProfileStore) -> None:
    users = [f"u{number}" for number in range(10)]

    def work(number: int) -> int:
        if number == 0:
            return sum(
                store.put_lines([line(user, answered(f"import-{turn}")) for user in users]).num_answers
                for turn in range(5)
            )
        return sum(store.answers.add(user, answered(f"session-{number}")) > 0 for user in users)

    assert at_once(4, work) == [50, 10, 10, 10]
    expected = {*(f"import-{turn}" for turn in range(5)), *(f"session-{number}" for number in (1, 2, 3))}
    for user in users:
        questions = [each.question.id for each in store.answers.of(user)]
        assert (len(questions), set(questions)) == (8, expected)
        assert [each for each in questions if each.startswith("import")] == [f"import-{turn}" for turn in range(5)]


def test_many_answers_come_back_from_another_store(store: ProfileStore, tmp_path: object) -> None:
    dice = random.Random(4)
    for number in range(40):
        for question in dice.sample(range(50), dice.randint(1, 12)):
            given = answered(f"q{question}", dice.choice(CHOICES), swapped=dice.random() < 0.5)
            store.answers.add(f"user {number}", given)
    with ProfileStore.open(f"{tmp_path}/other.db") as other:
        other.put_lines(line(user, *store.answers.of(user)) for user in store.answers.users())
        assert list(other.answers.users()) == list(store.answers.users())
        for user in store.answers.users():
            assert other.answers.of(user) == store.answers.of(user)
