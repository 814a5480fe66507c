"""The rules for the names of users in a profile store."""

from __future__ import annotations

from personalized_soups.errors import DeclarationError

MAX_USER_BYTES = 256


def check_user(user: str, where: str = "user") -> None:
    """Raise if a profile store cannot store a user's name.

    A name may contain any characters, such as slashes, quotes, line breaks and control characters, except NUL and lone
    surrogates. PostgreSQL cannot store NUL. A name must not be empty and must not take more than MAX_USER_BYTES bytes
    in UTF-8.

    Args:
        user: the name.
        where: the place where the name was given, for the error.

    Raises:
        DeclarationError: if the name breaks a rule. The error names the rule.
    """
    if not user:
        raise DeclarationError("the user's name is empty", where=where, mend="give a name, such as u1042")
    if "\0" in user:
        raise DeclarationError(
            f"the user's name {user[:40]!r} contains NUL", where=where, mend="remove the character NUL"
        )
    check_unicode(user, where)
    if len(user) * 4 > MAX_USER_BYTES and (size := len(user.encode())) > MAX_USER_BYTES:
        raise DeclarationError(
            f"the user's name {user[:40]!r}... takes {size} bytes in UTF-8, but at most {MAX_USER_BYTES} are allowed",
            where=where,
            mend="use a shorter name, such as a number or a hash",
        )


def check_unicode(user: str, where: str) -> None:
    """Raise if a user's name contains lone surrogates.

    Raises:
        DeclarationError: if it does. The error contains the name.
    """
    if has_surrogates(user):
        raise DeclarationError(
            f"the user's name {user[:40]!r} is not Unicode text: it contains half of a surrogate pair",
            where=where,
            mend="decode the name as UTF-8",
        )


def has_surrogates(text: str) -> bool:
    """Return whether a text contains lone surrogates, which UTF-8 cannot encode."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
