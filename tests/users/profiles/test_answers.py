"""The answers of users, in SQLite and PostgreSQL alike."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from personalized_soups.declare.evidence import AnsweredQuestion
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, FileFormatError
from personalized_soups.users.profiles import answer_statements
from personalized_soups.users.profiles import answers as answers_module
from personalized_soups.users.profiles.answers import AnsweredOtherwise, AnswersChanged
from personalized_soups.users.profiles.store import ABSENT, Deletion, ProfileStore, UnknownProfile, VersionConflict
from tests.users.profiles.evidence import answered, time_of, timeless
from tests.users.profiles.test_store import NAMES, TRICKS
from tests.users.profiles.writers import profile_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


def test_answers_come_back_in_order_with_their_times(store: ProfileStore) -> None:
    begin = datetime.now(UTC)
    given = [answered("q9", "b", swapped=True), answered("q1", "tie"), answered("q5", "a", probability=0.3)]
    assert [store.answers.add("ada", each) for each in given] == [1, 2, 3]
    assert store.answers.add("bob", answered("q1", "skip")) == 1
    stored = store.answers.of("ada")
    assert [timeless(each) for each in stored] == given
    assert begin <= time_of(stored[0]) <= time_of(stored[1]) <= time_of(stored[2]) <= datetime.now(UTC)
    assert all(time_of(each).utcoffset() == timedelta(0) for each in stored)
    assert (store.answers.count("ada"), store.answers.count("bob"), store.answers.count("eve")) == (3, 1, 0)
    assert (store.answers.of("eve"), store.answers.undo("eve"), store.answers.delete("eve")) == ([], None, 0)


def test_a_given_time_is_kept_unless_it_is_in_the_future(store: ProfileStore) -> None:
    past = datetime(2024, 3, 1, 12, 30, 0, 123456, tzinfo=timezone(timedelta(hours=5)))
    future = datetime.now(UTC) + timedelta(days=400)
    store.answers.add("ada", answered("q1", answered_at=past))
    store.answers.add("ada", answered("q2", answered_at=future))
    first, second = store.answers.of("ada")
    assert time_of(first) == past
    assert datetime.now(UTC) - timedelta(minutes=10) < time_of(second) <= datetime.now(UTC)


def test_a_repeated_answer_is_stored_once(store: ProfileStore) -> None:
    assert store.answers.add("ada", answered("q1", "b"), expected=0) == 1
    assert store.answers.add("ada", answered("q2", "a"), expected=1) == 2
    before = store.answers.of("ada")
    # the caller of the first call did not see its result, and repeats it later
    assert store.answers.add("ada", answered("q1", "b", answered_at=datetime.now(UTC)), expected=0) == 2
    assert store.answers.of("ada") == before


@pytest.mark.parametrize(
    "other",
    [
        answered("q1", "a"),
        answered("q1", "b", swapped=True),
        answered("q1", "b", probability=0.2),
        answered("q1", "b").replaced(question=answered("q1").question.replaced(prompt="another prompt")),
    ],
    ids=["choice", "swapped", "probability", "texts"],
)
def test_another_answer_to_a_question_is_refused_unless_it_replaces(
    store: ProfileStore, other: AnsweredQuestion
) -> None:
    first = answered("q1", "b", answered_at=datetime(2024, 1, 1, tzinfo=UTC))
    store.answers.add("ada", first)
    store.answers.add("ada", answered("q2"))
    before = store.answers.of("ada")
    with pytest.raises(AnsweredOtherwise, match="another answer of 'ada' to the question 'q1' is stored"):
        store.answers.add("ada", other)
    assert store.answers.of("ada") == before
    assert store.answers.add("ada", other, expected=2, replace=True) == 2
    replaced, second = store.answers.of("ada")
    assert (timeless(replaced), second) == (other, before[1])
    assert time_of(replaced) > time_of(first)


def test_the_expected_number_of_answers_is_checked(store: ProfileStore) -> None:
    store.answers.add("ada", answered("q1"), expected=0)
    for expected in (0, 2):
        with pytest.raises(AnswersChanged, match=f"has 1 answer, but {expected} were expected: another session") as e:
            store.answers.add("ada", answered("q2"), expected=expected)
        assert e.value.current == 1
        assert "read the stored answers again" in e.value.mend
        with pytest.raises(AnswersChanged):
            store.answers.undo("ada", expected=expected)
        with pytest.raises(AnswersChanged):
            store.answers.add("ada", answered("q1", "b"), expected=expected, replace=True)
    assert [timeless(each) for each in store.answers.of("ada")] == [answered("q1")]
    # the other answers of the store do not count
    assert store.answers.add("bob", answered("q2"), expected=0) == 1
    error = pickle.loads(pickle.dumps(AnswersChanged("what", where="where", mend="mend", current=7)))
    assert (type(error), error.current, error.mend) == (AnswersChanged, 7, "mend")


def test_undo_takes_back_the_last_answer(store: ProfileStore) -> None:
    for question in ("q3", "q1", "q2"):
        store.answers.add("ada", answered(question))
    for question, left in (("q2", 2), ("q1", 1)):
        undone = store.answers.undo("ada", expected=left + 1)
        assert undone is not None
        assert (undone.question.id, store.answers.count("ada")) == (question, left)
        assert time_of(undone) <= datetime.now(UTC)
    store.answers.add("ada", answered("q0"))
    assert [each.question.id for each in store.answers.of("ada")] == ["q3", "q0"]
    assert store.answers.add("ada", answered("q1", "b"), expected=2) == 3


def test_a_deleted_user_has_no_answers_left(store: ProfileStore) -> None:
    for user in ("ada", "bob", "eve", "joe"):
        store.answers.add(user, answered("q1"))
        store.answers.add(user, answered("q2"))
    store.put(profile_of("ada", 1))
    store.put(profile_of("ada", 2))
    with pytest.raises(VersionConflict):
        store.delete("ada", expected=1)
    assert store.answers.count("ada") == 2
    assert store.delete("ada", expected=2) == Deletion(num_versions=2, num_answers=2)
    # users without a profile
    assert store.delete("bob") == Deletion(0, 2)
    with pytest.raises(VersionConflict):
        store.delete("joe", expected=1)
    assert store.delete("joe", expected=ABSENT) == Deletion(0, 2)
    assert store.answers.delete("eve") == 2
    for user in ("ada", "bob", "eve", "joe", "nobody else"):
        assert store.answers.of(user) == []
        with pytest.raises(UnknownProfile):
            store.delete(user)
    assert list(store.answers.users()) == []


def test_to_delete_the_answers_leaves_the_profile(store: ProfileStore) -> None:
    written = store.put(profile_of("ada", 1))
    store.answers.add("ada", answered("q1"))
    assert [each.profile.user for each in store.page()] == ["ada"]
    assert store.answers.delete("ada") == 1
    assert store.get("ada") == written


def test_answers_expire_by_their_own_time(store: ProfileStore) -> None:
    limit = datetime(2025, 6, 1, tzinfo=UTC)
    second = timedelta(seconds=1)
    for user, question, time in (
        ("ada", "q1", limit - second),
        ("ada", "q2", limit),
        ("ada", "q3", limit + second),
        ("bob", "q1", limit - 2 * second),
        ("eve", "q1", limit),
    ):
        store.answers.add(user, answered(question, answered_at=time))
    store.put(profile_of("bob", 1))
    assert store.answers.expire(limit) == 2
    assert [each.question.id for each in store.answers.of("ada")] == ["q2", "q3"]
    assert list(store.answers.users()) == ["ada", "eve"]
    assert store.get("bob").version == 1
    assert store.answers.expire(limit) == 0
    # an answer that is added later still comes last
    store.answers.add("ada", answered("q0"))
    assert [each.question.id for each in store.answers.of("ada")] == ["q2", "q3", "q0"]
    assert store.answers.expire(datetime.now(UTC) + second) == 4
    with pytest.raises(ValueError, match="time zone"):
        store.answers.expire(datetime(2025, 1, 1))


@pytest.mark.parametrize("user", TRICKS)
def test_any_text_is_a_users_name(store: ProfileStore, user: str) -> None:
    store.answers.add("a neighbour", answered("q1"))
    store.answers.add(user, answered("q1", "b"))
    assert [each.answer.choice for each in store.answers.of(user)] == ["b"]
    assert set(store.answers.users()) == {"a neighbour", user}
    assert store.delete(user) == Deletion(0, 1)
    assert list(store.answers.users()) == ["a neighbour"]


@pytest.mark.parametrize("user", ["", "a\0b", "\ud800", "x" * 257])
def test_what_is_no_name_is_refused(store: ProfileStore, user: str) -> None:
    for ask in (
        lambda: store.answers.add(user, answered("q1")),
        lambda: store.answers.of(user),
        lambda: store.answers.count(user),
        lambda: store.answers.undo(user),
        lambda: store.answers.delete(user),
    ):
        with pytest.raises(DeclarationError):
            ask()


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(user=NAMES, texts=st.lists(TEXTS, min_size=3, max_size=3, unique=True), probability=st.floats(0, 1))
def test_texts_come_back_unchanged(store: ProfileStore, user: str, texts: list[str], probability: float) -> None:
    prompt, a, b = texts
    fields = {"question": {"id": "q1", "prompt": prompt, "a": a, "b": b}}
    given_one = AnsweredQuestion.model_validate(
        {**fields, "answer": {"question": "q1", "choice": "a", "probability": probability}}
    )
    store.answers.add(user, given_one, replace=True)
    assert [timeless(each) for each in store.answers.of(user)] == [given_one]
    assert user in store.answers.users()


def test_half_a_surrogate_pair_is_refused(store: ProfileStore) -> None:
    one = answered("q1")
    odd = one.model_copy(update={"question": one.question.model_copy(update={"b": "\ud800"})})
    with pytest.raises(DeclarationError, match="`b` of the question 'q1' is not Unicode text"):
        store.answers.add("ada", odd)
    assert store.answers.of("ada") == []


def test_users_are_listed_by_page(store: ProfileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "_PAGE", 3)
    names = ["é", "B", "a", "b", "😀", "a ", "A", "aa"]
    for name in names:
        store.answers.add(name, answered("q1"))
        store.answers.add(name, answered("q2"))
    assert list(store.answers.users()) == sorted(names)


def test_a_document_of_a_newer_version_is_told_without_its_texts(store: ProfileStore) -> None:
    store.answers.add("ada", answered("q1"))
    with store._database.engine.connect() as connection:
        document = json.dumps({"question": {"id": "q1", "prompt": "a private text"}, "kind": "new"})
        connection.execute(text("UPDATE psoups_answers SET document = :document"), {"document": document})
        connection.commit()
    with pytest.raises(FileFormatError, match="an answer of 'ada' is not a valid answered question") as error:
        store.answers.of("ada")
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_an_error_of_the_database_does_not_contain_the_texts(store: ProfileStore) -> None:
    """SQLAlchemy's errors contain the parameters of the statement unless `hide_parameters` is set."""

    def fail(connection: Any) -> None:
        row = {"user": "ada", "question": "q1", "number": 1, "document": "a private text", "answered_at": 0}
        connection.execute(answer_statements.ADD_ANSWER, row)
        connection.execute(text("SELECT :private FROM psoups_missing_table"), {"private": "a private text"})

    with pytest.raises(FileFormatError, match="no longer contains a profile store") as error:
        store._database.write(fail)
    assert "psoups_missing_table" in str(error.value.__cause__)
    assert not any("a private text" in str(each) for each in (error.value, error.value.__cause__))
    assert store.answers.of("ada") == []


# A store of schema 1


def schema_of(store: ProfileStore) -> int:
    with store._database.engine.connect() as connection:
        return int(connection.execute(text("SELECT schema FROM psoups_store")).scalar_one())


def test_reading_leaves_a_store_of_schema_1_as_it_is(old_store: str) -> None:
    with ProfileStore.open(old_store) as store:
        assert store.get("ada").profile == Profile(user="ada", weights={"friendly": 0.5})
        assert (store.answers.of("ada"), store.answers.count("ada")) == ([], 0)
        assert list(store.answers.users()) == []
        store.check_reachable()
        assert schema_of(store) == 1


def test_the_first_write_upgrades_a_store_of_schema_1(old_store: str) -> None:
    with ProfileStore.open(old_store) as reader, ProfileStore.open(old_store) as writer:
        assert reader.answers.of("ada") == []
        assert writer.answers.add("ada", answered("q1")) == 1
        assert [each.question.id for each in reader.answers.of("ada")] == ["q1"]
        assert schema_of(reader) == 2
        assert reader.answers.add("ada", answered("q2")) == 2
        assert writer.get("ada").version == 8
        # the greatest deleted version stays known
        assert writer.put(profile_of("bob", 1)).version == 8
        assert writer.delete("ada") == Deletion(1, 2)


@pytest.mark.parametrize("write", ["put", "put_many", "delete", "expire"])
def test_every_write_upgrades(old_store: str, write: str) -> None:
    with ProfileStore.open(old_store) as store:
        match write:
            case "put":
                assert store.put(profile_of("ada", 1)).version == 9
            case "put_many":
                assert store.put_many([profile_of("ada", 1), profile_of("bob", 1)]) == 2
                assert (store.get("ada").version, store.get("bob").version) == (9, 8)
            case "delete":
                assert store.delete("ada") == Deletion(1, 0)
            case "expire":
                assert store.answers.expire(datetime.now(UTC)) == 0
        assert schema_of(store) == 2
        assert store.answers.add("ada", answered("q1")) == 1


def test_a_failed_upgrade_leaves_schema_1(old_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from personalized_soups.users.profiles import postgres, sqlite
    from personalized_soups.users.profiles.schema import upgrade_tables

    def broken(connection: Any) -> None:
        upgrade_tables(connection)
        raise RuntimeError("the process ends here")

    with ProfileStore.open(old_store) as store:
        for module in (sqlite, postgres):
            monkeypatch.setattr(module, "upgrade_tables", broken)
        with pytest.raises(RuntimeError, match="ends here"):
            store.answers.add("ada", answered("q1"))
        assert (schema_of(store), store.answers.of("ada"), store.get("ada").version) == (1, [], 8)
        monkeypatch.undo()
        assert store.answers.add("ada", answered("q1")) == 1
