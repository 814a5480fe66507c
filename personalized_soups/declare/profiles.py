"""Many profiles in one file: JSON Lines, one profile a line, read as they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from personalized_soups.declare.declared import Places
from personalized_soups.declare.loader import load_data
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, SoupError, UsageError

# What is told of a line that is passed over.
OnBad: TypeAlias = Callable[[SoupError], None]


def read_profiles(path: Path | str, *, on_bad: OnBad | None = None) -> Iterator[Profile]:
    """Yield the profiles of a JSON Lines file; empty lines are passed over. Memory: one line.

    Args:
        path: of the file, in UTF-8.
        on_bad: called with the error of each line that is at fault, which is passed over; None raises the error.

    Raises:
        DeclarationError: with file and line, for anything that is wrong with the file or in a line.
    """
    path = Path(path)
    try:
        # bytes that are not UTF-8 come as surrogates, in their own line: a strict decoder fails a whole block earlier
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    profile = _profile(line, f"{path}:{number}")
                except DeclarationError as error:
                    if on_bad is None:
                        raise
                    on_bad(error)
                else:
                    yield profile
    except OSError as error:
        raise DeclarationError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check the path and its permissions"
        ) from error


class SeenUsers:
    """The users whose profiles have been read; sixteen bytes are kept of each."""

    def __init__(self) -> None:
        self._marks: set[bytes] = set()

    def add(self, profile: Profile) -> None:
        """Note the profile's user.

        Raises:
            UsageError: if a profile of this user was noted before.
        """
        mark = hashlib.blake2b(profile.user.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if mark in self._marks:
            raise UsageError(
                f"two profiles are of the user {profile.user!r}",
                where=profile.place("user"),
                mend="give each user one profile, or name them apart",
            )
        self._marks.add(mark)


def each_once(profiles: Iterable[Profile]) -> Iterator[Profile]:
    """Yield the profiles as they come; of their users sixteen bytes each are kept.

    Raises:
        UsageError: where a second profile is of one user.
    """
    seen = SeenUsers()
    for profile in profiles:
        seen.add(profile)
        yield profile


def _profile(line: str, where: str) -> Profile:
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) & 0xFF  # surrogateescape: U+DC00 and the byte
            raise DeclarationError(f"not UTF-8: byte 0x{byte:02x}", where=where, mend="save it as UTF-8") from None
    try:
        table = json.loads(line, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise DeclarationError(
            f"the line is not JSON: {str(error)[:200]}",
            where=where,
            mend='write one profile a line: {"user": "u1042", "weights": {"expert": 0.6}}, no YAML',
        ) from None
    if not isinstance(table, dict):
        raise DeclarationError(
            f"the line holds a {type(table).__name__}, not a profile",
            where=where,
            mend='write one profile a line: {"user": "u1042", "weights": {"expert": 0.6}}',
        )
    try:
        # a third of the time; whatever is wrong is found again, and told, the long way
        return Profile.model_validate_json(line).with_places(Places(where, {}))
    except ValidationError:
        return load_data(table, Profile, where)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is repeated")
    return table
