"""The file of API keys. A key has full access, or is bound to one user."""

from __future__ import annotations

import stat
from pathlib import Path

from personalized_soups.errors import InputError, SoupError
from personalized_soups.serving.web.settings import ApiKey
from personalized_soups.users.profiles.names import check_user

# Minimum number of characters of an API key. Shorter keys can be guessed.
_MIN_KEY = 16

_NEW_KEY = 'python -c "import secrets; print(secrets.token_urlsafe(32))"'
_USER = "user="


def read_keys(path: Path) -> list[ApiKey]:
    """Return the API keys in a file.

    Each line is `KEY`, for a key with full access, or `KEY user=NAME`, for a key that may use only the data of one
    user. The rest of the line after `user=` is the name, so it may contain spaces. Empty lines and lines that start
    with # are skipped.

    Raises:
        InputError: if the file cannot be read, if other users may read or write it, if it contains no key, or if a line
            is invalid. The error never contains a key.
    """
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the API keys cannot be read: {error}", where=str(path), mend="give a text file in UTF-8, one key per line"
        ) from None
    if mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            "other users of this machine can read or change the API keys",
            where=str(path),
            mend=f"run chmod 600 {path}",
        )
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key = _key(line.removesuffix("\r"), f"{path}:{number}")
        if key.text in keys:
            raise InputError(
                "an API key is in the file twice",
                where=f"{path}:{number}",
                mend=f"remove one of the lines, or create another key with {_NEW_KEY}",
            )
        keys[key.text] = key
    if not keys:
        raise InputError(
            "the file contains no API key", where=str(path), mend=f"add a key to the file, for example from {_NEW_KEY}"
        )
    return list(keys.values())


def _key(line: str, where: str) -> ApiKey:
    """Return the key in a line.

    Raises:
        InputError: if the key is too short or not ASCII, or the user's name is invalid.
    """
    text, *rest = line.lstrip().split(maxsplit=1)
    if not text.isascii():
        raise InputError(
            "an API key contains a character that is not ASCII",
            where=where,
            mend=f"replace the key; create a new one with {_NEW_KEY}",
        )
    if len(text) < _MIN_KEY:
        raise InputError(
            f"an API key has fewer than {_MIN_KEY} characters",
            where=where,
            mend=f"replace the key; create a longer one with {_NEW_KEY}",
        )
    if not rest:
        return ApiKey(text)
    if not rest[0].startswith(_USER):
        raise InputError(
            f"an API key is followed by something else than `{_USER}NAME`",
            where=where,
            mend=f"write {_USER}NAME after the key to bind it to a user, or nothing; a key contains no white space",
        )
    user = rest[0].removeprefix(_USER)
    if user != user.strip():
        raise InputError(
            "the user's name starts or ends with white space",
            where=where,
            mend=f"write {_USER}NAME without white space around the name",
        )
    try:
        check_user(user, where)
    except SoupError as error:
        raise InputError(error.what, where=where, mend=error.mend) from None
    return ApiKey(text, user)
