"""Programs that write to a store in processes of their own, for the tests to run side by side and to kill."""

# ruff: noqa: T201 # they print for the test that started them

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from personalized_soups.declare.profile import Profile
from personalized_soups.users.profiles.answers import AnswersChanged
from personalized_soups.users.profiles.store import ProfileStore, VersionConflict
from tests.users.profiles.evidence import answered


def profile_of(user: str, weight: float) -> Profile:
    return Profile(user=user, weights={"friendly": weight})


def add_one(store: ProfileStore, user: str) -> int:
    """Add 1 to a user's weight, however many others do the same; return how often others were quicker."""
    conflicts = 0
    while True:
        there = store.get(user)
        try:
            store.put(profile_of(user, there.profile.weights["friendly"] + 1), expected=there.version)
        except VersionConflict:
            conflicts += 1
        else:
            return conflicts


def increment(where: str, user: str, count: str) -> None:
    with ProfileStore.open(where) as store:
        print("ready", flush=True)
        sys.stdin.readline()
        print(sum(add_one(store, user) for _ in range(int(count))), flush=True)


def make(where: str, number: str) -> None:
    """Make the store and write to it, while others make it, too."""
    print("ready", flush=True)
    sys.stdin.readline()
    with ProfileStore.open(where) as store:
        store.put(profile_of(f"u{number}", 1))
    print("made", flush=True)


def bring_in(where: str, count: str) -> None:
    """Import so many profiles; say when all are read, before they are written."""

    def profiles() -> Iterator[Profile]:
        for number in range(int(count)):
            yield profile_of(f"u{number:06d}", 2)
        print("read", flush=True)

    with ProfileStore.open(where) as store:
        print("ready", flush=True)
        store.put_many(profiles())
    print("written", flush=True)


def answer(where: str, name: str, count: str) -> None:
    """Answer so many questions of the user u1 in a session; print how often another session had added an answer."""
    conflicts = 0
    with ProfileStore.open(where) as store:
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(int(count)):
            question = answered(f"{name}-{number}")
            while True:
                try:
                    store.answers.add("u1", question, expected=store.answers.count("u1"))
                except AnswersChanged:
                    conflicts += 1
                else:
                    break
    print(conflicts, flush=True)


PROGRAMS: dict[str, Callable[..., None]] = {
    "increment": increment,
    "make": make,
    "bring_in": bring_in,
    "answer": answer,
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
