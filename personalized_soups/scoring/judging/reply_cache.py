"""Store the replies of a judge on disk, by the content of the request, so that no request is sent twice."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blake3 import blake3

from personalized_soups.errors import FileFormatError, RunError

_SECONDS_TO_WAIT = 60.0  # while another process writes


@dataclass(frozen=True, slots=True)
class Reply:
    """What an endpoint replied to one request.

    Attributes:
        text: the reply's text.
        model: the model's name as the endpoint gives it, which may be more exact than the request's.
        fingerprint: the endpoint's name for the state of its system, if it gives one.
        is_cut: whether the reply reached its largest number of tokens.
        input_tokens, output_tokens: the numbers of tokens that the endpoint counted.
    """

    text: str
    model: str
    fingerprint: str | None
    is_cut: bool
    input_tokens: int
    output_tokens: int


class ReplyCache:
    """The replies in an SQLite file. A context manager; several processes may use the file at once.

    Args:
        path: the file. It is created with its folder if it does not exist.

    Raises:
        FileFormatError: if the file is not such a cache.
        RunError: if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_SECONDS_TO_WAIT, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise self._unusable(error) from error
        try:
            with self._errors():
                self._connection.execute("PRAGMA journal_mode = WAL")
                self._connection.execute("PRAGMA synchronous = NORMAL")
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID"
                )
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def get(self, key: str) -> Reply | None:
        """Return the stored reply, or None."""
        with self._errors():
            row = self._connection.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
            return None if row is None else Reply(**json.loads(row[0]))

    def add(self, key: str, reply: Reply) -> None:
        """Store a reply. A reply that is stored already stays."""
        with self._errors():
            self._connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, json.dumps(asdict(reply))))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._unusable(error) from error
        except (sqlite3.DatabaseError, ValueError, TypeError) as error:
            raise FileFormatError(
                f"the file is not a cache of replies, or it is damaged: {error}",
                where=str(self._path),
                mend="give another file, or delete this one: its replies are then asked for again",
            ) from error

    def _unusable(self, error: Exception) -> RunError:
        return RunError(
            f"the cache of replies cannot be read or written: {error}",
            where=str(self._path),
            mend="give a file in a folder in which you may write, on a disk that is not full",
        )


def request_key(endpoint: str, request: Mapping[str, Any]) -> str:
    """Return the hex digest that identifies a request to an endpoint, with all its parameters.

    Example:
        >>> request_key("http://a/v1", {"model": "m"}) == request_key("http://b/v1", {"model": "m"})
        False
    """
    return str(blake3(json.dumps([endpoint, request], sort_keys=True).encode()).hexdigest())
