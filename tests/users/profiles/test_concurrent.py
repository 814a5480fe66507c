"""Many writers at once: nothing is lost, no version is used twice, and readers do not wait."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from personalized_soups.declare.profile import Profile
from personalized_soups.users.profiles.answers import AnswersChanged
from personalized_soups.users.profiles.store import (
    ABSENT,
    ProfileStore,
    StoredProfile,
    StoreUnavailable,
    UnknownProfile,
    VersionConflict,
)
from tests.users.profiles.evidence import answered
from tests.users.profiles.writers import add_one, profile_of

ROOT = Path(__file__).parents[2]


def at_once(num_threads: int, work: Callable[[int], object]) -> list[object]:
    """Run `work` in so many threads that begin together, and return what they return."""
    barrier = threading.Barrier(num_threads)

    def run(number: int) -> object:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(run, range(num_threads)))


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.users.profiles.writers", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def together(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Let processes go once all are ready, and return what each says last."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    said = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        out, _ = process.communicate(timeout=280)
        assert process.returncode == 0
        said.append(out)
    return said


def test_threads_lose_no_update(where: str) -> None:
    with ProfileStore.open(where) as store:
        store.put(profile_of("u1", 1))
        at_once(8, lambda _: [add_one(store, "u1") for _ in range(12)])
        assert store.get("u1").profile.weights == {"friendly": 97.0}
        assert [(each.version, each.profile.weights["friendly"]) for each in store.history("u1")] == [
            (number, float(number)) for number in range(1, 98)
        ]


def test_processes_lose_no_update(where: str) -> None:
    with ProfileStore.open(where) as store:
        store.put(profile_of("u1", 1))
        together([start("increment", where, "u1", 25) for _ in range(4)])
        assert store.get("u1").profile.weights == {"friendly": 101.0}
        assert [each.version for each in store.history("u1")] == list(range(1, 102))


def test_sessions_of_one_user_lose_no_answer(where: str) -> None:
    with ProfileStore.open(where) as store:
        together([start("answer", where, name, 12) for name in ("x", "y", "z")])
        questions = [each.question.id for each in store.answers.of("u1")]
        assert len(questions) == 36
        for name in ("x", "y", "z"):  # the answers of each session are in the session's order
            assert [each for each in questions if each.startswith(name)] == [f"{name}-{n}" for n in range(12)]


def test_of_many_sessions_that_saw_the_same_answers_one_adds_its_own(store: ProfileStore) -> None:
    store.answers.add("u1", answered("first"))

    def add(number: int) -> int:
        try:
            return store.answers.add("u1", answered(f"q{number}"), expected=1)
        except AnswersChanged as changed:
            return -changed.current

    added = at_once(8, add)
    assert sorted(map(int, map(str, added))) == [-2] * 7 + [2]
    assert [each.question.id for each in store.answers.of("u1")] == ["first", f"q{added.index(2)}"]


def test_one_answer_that_many_send_at_once_is_stored_once(store: ProfileStore) -> None:
    assert at_once(8, lambda _: store.answers.add("u1", answered("q1"), expected=0)) == [1] * 8
    assert store.answers.count("u1") == 1


def test_while_a_user_is_deleted_answers_are_added_before_or_after(store: ProfileStore) -> None:
    """A deletion removes all answers that were added before it. What is there in the end was added after it."""

    def work(number: int) -> int:
        if number == 0:
            return store.answers.delete("u1")
        return sum(store.answers.add("u1", answered(f"q{number}-{turn}")) > 0 for turn in range(10))

    deleted, *added = at_once(4, work)
    assert added == [10, 10, 10]
    assert store.answers.count("u1") == 30 - int(str(deleted))


def test_processes_that_upgrade_one_store_lose_nothing(old_store: str) -> None:
    together([start("answer", old_store, name, 3) for name in ("x", "y", "z", "v")])
    with ProfileStore.open(old_store) as store:
        assert store.answers.count("u1") == 12
        assert store.get("ada").version == 8


def test_processes_that_make_one_store_make_one(where: str) -> None:
    together([start("make", where, number) for number in range(5)])
    with ProfileStore.open(where, create=False) as store:
        assert [each.profile.user for each in store.all()] == [f"u{number}" for number in range(5)]


def test_one_of_many_creates(store: ProfileStore) -> None:
    def create(number: int) -> bool:
        try:
            store.put(profile_of("u1", number + 1), expected=ABSENT)
        except VersionConflict as conflict:
            return conflict.current != 1
        return True

    won = at_once(8, create)
    assert sum(map(bool, won)) == 1
    assert store.get("u1").profile.weights == {"friendly": float(won.index(True) + 1)}


def test_writers_and_deleters_never_give_one_version_twice(store: ProfileStore) -> None:
    written: list[StoredProfile] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        for turn in range(25):
            user = f"u{dice.randrange(3)}"
            try:
                if dice.random() < 0.3:
                    store.delete(user)
                elif dice.random() < 0.2:
                    # what one import writes is not known by its versions; it has to get in line all the same
                    store.put_many([profile_of("u0", number * 1000 + turn + 0.5), profile_of("u1", turn + 0.5)])
                else:
                    written.append(store.put(profile_of(user, number * 1000 + turn + 1)))
            except UnknownProfile:
                pass

    at_once(6, work)
    keys = [(each.profile.user, each.version) for each in written]
    assert len(keys) > 50
    assert len(set(keys)) == len(keys)
    by_key = {(each.profile.user, each.version): each for each in written}
    for current in store.all():
        history = store.history(current.profile.user)
        versions = [each.version for each in history]
        assert versions == list(range(versions[0], versions[0] + len(versions)))
        assert all(by_key.get((each.profile.user, each.version), each) == each for each in history)


def test_an_import_neither_loses_nor_overtakes_what_others_write(store: ProfileStore) -> None:
    users = [f"u{number}" for number in range(20)]
    store.put_many(profile_of(user, 1) for user in users)

    def work(number: int) -> int:
        if number == 0:
            return sum(store.put_many(profile_of(user, turn * 1000 + 0.5) for user in users) for turn in range(8))
        for user in users:
            add_one(store, user)
        return len(users)

    counts = at_once(4, work)
    assert counts == [8 * 20, 20, 20, 20]
    for user in users:
        assert [each.version for each in store.history(user)] == list(range(1, 1 + 1 + 8 + 3))


def test_while_an_import_reads_nobody_waits(where: str) -> None:
    with ProfileStore.open(where, patience=0.2) as store:
        store.put(profile_of("u1", 1))

        def profiles() -> Iterator[Profile]:
            for number in range(6000):
                yield profile_of(f"u{number}", 3)
            assert store.get("u1").version == 1
            assert store.put(profile_of("u1", 2)).version == 2
            with pytest.raises(UnknownProfile):
                store.get("u5000")

        store.put_many(profiles())
        assert (store.get("u1").version, store.get("u5000").version) == (3, 1)


def test_while_a_writer_has_the_lock_readers_read_and_writers_give_up_in_time(where: str) -> None:
    with ProfileStore.open(where, patience=0.3) as store, ProfileStore.open(where) as other:
        first = store.put(profile_of("u1", 1))
        with other._database.engine.connect() as connection:
            if "://" in where:
                connection.execution_options(isolation_level="READ COMMITTED")
                connection.execute(text("LOCK TABLE psoups_profiles IN EXCLUSIVE MODE"))
            else:
                connection.execute(text("BEGIN IMMEDIATE"))
            connection.execute(text("UPDATE psoups_profiles SET version = 5"))
            assert store.get("u1") == first
            assert list(store.all()) == [first]
            for write in (lambda: store.put(profile_of("u1", 2)), lambda: store.put_many([profile_of("u1", 2)])):
                with pytest.raises(StoreUnavailable, match="held the lock for too long"):
                    write()
            connection.rollback()
        assert store.put(profile_of("u1", 2)).version == 2


def test_more_threads_than_connections_take_turns(store: ProfileStore) -> None:
    store.put(profile_of("u1", 1))
    assert set(at_once(60, lambda _: [store.get("u1").version for _ in range(20)][-1])) == {1}
