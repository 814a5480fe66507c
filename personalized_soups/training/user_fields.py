"""Read the user of a preference pair: the fields `user` and `user_text`.

`user` is the id of the user who compared the answers, a string. A pair without a user teaches the generic user only.
`user_text` describes the user in words. It is put before the prompt, so the model reads it as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from personalized_soups.errors import InputError
from personalized_soups.generation.prompts import with_text_before


def with_user(pair: Mapping[str, Any], row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a copy of a pair with its `user`, if the row names one, and with the row's `user_text` in its prompt.

    Raises:
        InputError: if `user` or `user_text` is not a string, or is empty.
    """
    user = _text_of(row, "user", where, mend='write "user": "u1042", or remove "user" for the generic user')
    text = _text_of(row, "user_text", where, mend='write "user_text": "I am a nurse.", or remove "user_text"')
    result = dict(pair)
    if text is not None:
        result["prompt"] = with_text_before(pair["prompt"], text)
    if user is not None:
        result["user"] = user
    return result


def _text_of(row: Mapping[str, Any], field: str, where: str, *, mend: str) -> str | None:
    value = row.get(field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise InputError(f"`{field}` must be a string, but it is {value!r}", where=where, mend=mend)
    if not value.strip():
        raise InputError(f"`{field}` is empty", where=where, mend=mend)
    return value
