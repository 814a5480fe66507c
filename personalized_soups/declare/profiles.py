"""Read a JSON Lines file with one profile in each line. Only one line at a time is in memory.

A line can also hold the answers of a user to questions. Such a line has `answers` and no `weights`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from personalized_soups.declare.declared import Places
from personalized_soups.declare.evidence import UserAnswers
from personalized_soups.declare.json_lines import LineKind, json_object, text_lines
from personalized_soups.declare.loader import load_data
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, SoupError, UsageError

# A function that is called with the error of each skipped line.
OnBad: TypeAlias = Callable[[SoupError], None]

_PROFILE = LineKind("profile", '{"user": "u1042", "weights": {"expert": 0.6}}')


def read_profiles(path: Path | str, *, on_bad: OnBad | None = None) -> Iterator[Profile]:
    """Yield the profiles of a JSON Lines file. Empty lines and lines of answers are skipped.

    Args:
        path: the file, in UTF-8.
        on_bad: called with the error of each invalid line. The line is then skipped. If `on_bad` is None, the error is
            raised.

    Raises:
        DeclarationError: if the file cannot be read, or if a line is invalid and `on_bad` is None.
    """
    for line in read_user_lines(path, on_bad=on_bad):
        if isinstance(line, Profile):
            yield line


def read_user_lines(path: Path | str, *, on_bad: OnBad | None = None) -> Iterator[Profile | UserAnswers]:
    """Yield the profiles and the users' answers in a JSON Lines file, as `read_profiles` does.

    Raises:
        DeclarationError: if the file cannot be read, or if a line is invalid and `on_bad` is None.
    """
    for where, line in text_lines(Path(path)):
        try:
            declared = _declared(line, where)
        except DeclarationError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield declared


class SeenUsers:
    """The users whose profiles were read. Each user is stored as a digest of 16 bytes.

    Args:
        one: what each user may have only once, for the error.
        several: the plural of `one`.
    """

    def __init__(self, one: str = "profile", several: str = "profiles") -> None:
        self._one, self._several = one, several
        self._marks: set[bytes] = set()

    def add(self, profile: Profile | UserAnswers) -> None:
        """Add the user of a profile or of a line of answers.

        Raises:
            UsageError: if the user was added before.
        """
        mark = hashlib.blake2b(profile.user.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if mark in self._marks:
            raise UsageError(
                f"the user {profile.user!r} has two {self._several}",
                where=profile.place("user"),
                mend=f"keep one {self._one} for each user, or give the users different names",
            )
        self._marks.add(mark)


def each_once(profiles: Iterable[Profile]) -> Iterator[Profile]:
    """Yield the profiles, and check that each user has only one. A digest of 16 bytes is stored for each user.

    Raises:
        UsageError: if a user has two profiles.
    """
    seen = SeenUsers()
    for profile in profiles:
        seen.add(profile)
        yield profile


def _declared(line: str, where: str) -> Profile | UserAnswers:
    table = json_object(line, where, _PROFILE)
    if "answers" in table and "weights" not in table:
        return load_data(table, UserAnswers, where)
    try:
        # This takes a third of the time of `load_data`, which is called only for its better error.
        return Profile.model_validate_json(line).with_places(Places(where, {}))
    except ValidationError:
        return load_data(table, Profile, where)
