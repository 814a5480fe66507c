"""What is deleted is gone from the bytes of SQLite's files, and the search for it breaks no locks."""

from __future__ import annotations

import logging
import random
import sqlite3
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import event

from personalized_soups.declare.profile import Profile
from personalized_soups.users.profiles import sqlite_descriptors
from personalized_soups.users.profiles.store import ProfileStore, StoreFull, UnknownProfile
from tests.users.profiles.evidence import answered
from tests.users.profiles.test_concurrent import start, together
from tests.users.profiles.writers import profile_of


def read_elsewhere(path: Path) -> bytes:
    """Return the bytes of the database and its log, read by another process: a close in this one would drop locks."""
    done = subprocess.run(["cat", path, f"{path}-wal"], capture_output=True, check=True)
    return done.stdout


def write_many(store: ProfileStore, dice: random.Random, names: list[str]) -> None:
    """Write three versions of every user, of all lengths and in any order, so that pages are split."""
    for _ in range(3):
        dice.shuffle(names)
        store.put_many(
            Profile(user=name, weights={f"e{n}": round(dice.random(), 3) + 0.001 for n in range(dice.randint(1, 9))})
            for name in names[: len(names) // 2]
        )
        for name in names[len(names) // 2 :][:400]:
            store.put(profile_of(name, round(dice.random(), 3) + 0.001))


def test_nothing_of_a_deleted_user_is_left_in_the_files(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    dice = random.Random(1)
    names = [f"user-{dice.getrandbits(64):016x}-x" for _ in range(3000)]
    with ProfileStore.open(path) as store:
        write_many(store, dice, names)
        there = [each.profile.user for each in store.all()]
        dice.shuffle(there)
        assert all(name.encode() in read_elsewhere(path) for name in there[:3])
        for name in there[:400]:
            store.delete(name)
            assert name.encode() not in read_elsewhere(path), name
        assert [each.profile.user for each in store.all()] == sorted(there[400:])


def test_a_name_within_other_names_does_not_have_the_file_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProfileStore.open(tmp_path / "profiles.db") as store:
        store.put_many(profile_of(user, 1) for user in ("u1", "u10", "u11u1", "é1", "é10", "friend"))
        asked: list[str] = []
        engine = store._database.engine
        event.listen(engine, "before_cursor_execute", lambda _, __, statement, *___: asked.append(statement))
        for user in ("u1", "é1", "friend"):  # the last one is a part of an expert's name, too
            store.delete(user)
        assert [each.profile.user for each in store.all()] == ["u10", "u11u1", "é10"]
        assert "VACUUM" not in asked


def test_a_copy_in_an_unused_place_is_found_and_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profiles.db"
    with ProfileStore.open(path) as store:
        store.put_many(profile_of(user, 1) for user in ("somebody", "another"))
        with store._database.engine.connect() as connection:  # deleted as without secure_delete
            connection.exec_driver_sql("PRAGMA secure_delete = OFF")
            connection.exec_driver_sql("DELETE FROM psoups_profiles WHERE user = 'somebody'")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.exec_driver_sql("PRAGMA secure_delete = ON")
        assert b"somebody" in read_elsewhere(path)
        store._database.erase("somebody")
        assert b"somebody" not in read_elsewhere(path)
        assert [each.profile.user for each in store.all()] == ["another"]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_occurrences_are_counted_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(sqlite_descriptors, "_BLOCK", 5)
    dice = random.Random(size)
    data = bytes(dice.choice(b"ab") for _ in range(400))
    (tmp_path / "file").write_bytes(data)
    identity = sqlite_descriptors.hold(tmp_path / "file")
    assert identity is not None
    sought = data[50 : 50 + size]
    places = sum(data[place:].startswith(sought) for place in range(len(data)))
    # those that overlap may be counted once
    assert data.count(sought) <= sqlite_descriptors.count_bytes(identity, sought) <= places
    assert sqlite_descriptors.count_bytes(identity, b"c" * size) == 0
    sqlite_descriptors.release(identity)
    assert identity not in sqlite_descriptors._descriptors


def test_a_reader_in_the_way_is_told_of_and_the_log_is_emptied_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "profiles.db"
    with ProfileStore.open(path, patience=0.2) as store:
        store.put_many(profile_of(user, 1) for user in ("somebody", "another"))
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM psoups_profiles").fetchall()
        with caplog.at_level(logging.WARNING):
            store.delete("somebody")
        assert "a reader blocks the log" in caplog.text
        assert "somebody" not in caplog.text
        assert b"somebody" in read_elsewhere(path)
        reader.close()
        store.delete("another")
        assert b"somebody" not in read_elsewhere(path)


def test_to_search_and_close_one_store_leaves_the_locks_of_another(tmp_path: Path) -> None:
    """Without its lock on the file, a process that closes last would take the log of those that write away."""
    path = tmp_path / "profiles.db"
    with ProfileStore.open(path) as store:
        store.put(profile_of("u1", 1))
        with ProfileStore.open(path) as other:
            other.put(profile_of("u2", 1))
            other.delete("u2")
        together([start("make", path, 3)])  # opens the file and closes it, the last one for all it knows
        store.put(profile_of("u1", 2))
        assert Path(f"{path}-wal").stat().st_size > 0
    with ProfileStore.open(path) as store:
        assert {each.profile.user: each.version for each in store.all()} == {"u1": 2, "u3": 2}


def test_a_deletion_stands_where_the_bytes_cannot_be_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: str) -> None:
        raise StoreFull("the disk is full", where="disk", mend="free some space")

    with ProfileStore.open(tmp_path / "profiles.db") as store:
        store.put(profile_of("somebody", 1))
        monkeypatch.setattr(store._database, "erase", full)
        store.delete("somebody")
        assert "the disk is full" in caplog.text
        with pytest.raises(UnknownProfile):
            store.get("somebody")


def write_answers(store: ProfileStore, dice: random.Random, names: list[str]) -> None:
    """Write answers of all lengths in any order, so that pages are split and long documents take several pages."""
    turns = [(name, number) for name in names for number in range(6)]
    dice.shuffle(turns)
    for name, number in turns:
        length = dice.choice((3, 40, 300, 900, 6000))
        marked = " ".join([f"secret of {name}"] * (length // 30 + 1))
        given = answered(f"q{number}", answered_at=datetime(2024, 1 + number, 1, tzinfo=UTC))
        store.answers.add(name, given.replaced(question=given.question.replaced(prompt=marked)))


def test_nothing_of_a_deleted_users_answers_is_left_in_the_files(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    dice = random.Random(2)
    names = [f"user-{dice.getrandbits(64):016x}-x" for _ in range(120)]
    with ProfileStore.open(path) as store:
        write_answers(store, dice, names)
        for name in names[:2]:  # the text of an answer, in the file or its log
            assert f"secret of {name}".encode() in read_elsewhere(path)
        for name in names[:60]:
            assert store.delete(name).num_answers == 6
            assert name.encode() not in read_elsewhere(path), name
        assert set(store.answers.users()) == set(names[60:])
        assert all(store.answers.count(name) == 6 for name in names[60:])


def test_nothing_of_expired_answers_is_left_in_the_files(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    dice = random.Random(3)
    with ProfileStore.open(path) as store:
        for user in ("ada", "bob", "eve"):
            for number in range(12):
                given = answered(f"q{number}", answered_at=datetime(2024, 1 + number, 1, tzinfo=UTC))
                text = f"<{user} {number:02d}>" * dice.choice((1, 20, 500))
                store.answers.add(user, given.replaced(question=given.question.replaced(prompt=text)))
        assert store.answers.expire(datetime(2024, 7, 1, tzinfo=UTC)) == 18
        left = read_elsewhere(path)
        for user in ("ada", "bob", "eve"):
            found = [number for number in range(12) if f"<{user} {number:02d}>".encode() in left]
            assert found == list(range(6, 12))


def test_a_copy_of_an_answer_in_an_unused_place_is_found_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "profiles.db"
    with ProfileStore.open(path) as store:
        # the name occurs in a long answer of somebody else, where it may be split between two pages
        other = answered("q1")
        store.answers.add("other", other.replaced(question=other.question.replaced(prompt="ask somebody " * 700)))
        store.answers.add("somebody", answered("q1"))
        with store._database.engine.connect() as connection:  # deleted as without secure_delete
            connection.exec_driver_sql("PRAGMA secure_delete = OFF")
            connection.exec_driver_sql("DELETE FROM psoups_answers WHERE user = 'somebody'")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.exec_driver_sql("PRAGMA secure_delete = ON")
        assert b"somebodyq1" in read_elsewhere(path)  # the key of the row
        store._database.erase("ada", "somebody")
        assert b"somebodyq1" not in read_elsewhere(path)
        assert list(store.answers.users()) == ["other"]


def test_short_answers_of_others_do_not_have_the_file_written_anew(tmp_path: Path) -> None:
    with ProfileStore.open(tmp_path / "profiles.db") as store:
        for user in ("one", "q1", "bob"):
            given = answered("q1")
            store.answers.add(user, given.replaced(question=given.question.replaced(prompt="one q1 bob")))
        asked: list[str] = []
        event.listen(
            store._database.engine, "before_cursor_execute", lambda _, __, statement, *___: asked.append(statement)
        )
        for user in ("one", "q1", "bob"):  # the first two are parts of the texts and of the question's name
            assert store.answers.delete(user) == 1
        assert asked
        assert "VACUUM" not in asked
