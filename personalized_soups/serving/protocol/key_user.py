"""The user to whom a request's API key is bound.

A key with full access may use all routes. A bound key may use only the data of its user. `web/access.py` refuses the
routes that a bound key may not use. Routes whose answers depend on the user must call the functions of this module.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

from personalized_soups.serving.protocol.faults import ApiError

_KEY = "psoups.key_user"


def bind(scope: MutableMapping[str, Any], user: str | None) -> None:
    """Record the user to whom the request's key is bound, or None for a key with full access.

    Args:
        scope: the ASGI scope of the request.
        user: the user.
    """
    scope[_KEY] = user


def key_user(scope: Mapping[str, Any]) -> str | None:
    """Return the user to whom the request's key is bound. None means full access.

    Args:
        scope: the ASGI scope of the request.
    """
    user: str | None = scope[_KEY]
    return user


def check_key_user(bound: str | None, user: str, param: str | None = None) -> None:
    """Raise if a key may not use the data of a user.

    Args:
        bound: the user to whom the key is bound, from `key_user`.
        user: the user whose data the request would use.
        param: the request parameter that names the user, for the error.

    Raises:
        ApiError: 403 if the key is bound to another user. The error is the same whether or not the user exists.
    """
    if bound is not None and bound != user:
        raise forbidden(param)


def forbidden(param: str | None = None) -> ApiError:
    """Return the error for a request that a bound key may not send."""
    return ApiError(
        403,
        "this API key is bound to one user: it may use only the profile, the answers and the soup of its own user; "
        "send a key with full access for anything else",
        param=param,
        code="forbidden_user",
    )
