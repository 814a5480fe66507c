"""The times in a profile store: whole microseconds since 1970 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def now() -> int:
    """Return the current time."""
    return microseconds_of(datetime.now(UTC))


def microseconds_of(time: datetime) -> int:
    """Return an aware time in microseconds since 1970."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def time_of(microseconds: int) -> datetime:
    """Return a stored time as a datetime in UTC."""
    return _EPOCH + timedelta(microseconds=microseconds)
