"""The base class of everything that people declare in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr
from pydantic_core import PydanticCustomError

KeyPath = tuple[str | int, ...]


class Places:
    """Where each key of a declaration stands; two declarations are equal wherever they stand.

    Args:
        source: the file, or the option of the command line.
        lines: every key's line, counted from 1; None where the source has no lines.
    """

    def __init__(self, source: str, lines: Mapping[KeyPath, int | None]) -> None:
        self.source = source
        self.lines = dict(lines)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places)

    def __hash__(self) -> int:
        return 0

    def of(self, path: KeyPath) -> str:
        """Return `file:line: key`; the nearest enclosing key's line where `path` itself is not in the file."""
        for end in range(len(path), 0, -1):
            if line := self.lines.get(path[:end]):
                return f"{self.source}:{line}: {dotted(path)}"
        return f"{self.source}: {dotted(path)}" if path else self.source


class Declared(BaseModel):
    """What a person writes in a file: closed, strict, unchangeable."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    _places: Places = PrivateAttr(default_factory=lambda: Places("", {}))

    def place(self, *path: str | int) -> str:
        """Return where a key was declared, as `file:line: key`, for the `where` of an error found later on."""
        if self._places.source:
            return self._places.of(path)
        return f"{type(self).__name__} {dotted(path)}".rstrip()

    def with_places(self, places: Places) -> Self:
        """Remember the file and lines that this was loaded from; returns the object itself."""
        self._places = places
        return self

    def replaced(self, **changes: Any) -> Self:
        """Return a checked copy with some fields changed (pydantic's own `model_copy` does not check)."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_validate({**fields, **changes}).with_places(self._places)


def dotted(path: KeyPath) -> str:
    """Return a key path as people write it: `dimensions.style.sides`."""
    return ".".join(str(part) for part in path)


def refusal(what: str, *, mend: str, key: KeyPath = ()) -> PydanticCustomError:
    """Return the error that a validator raises: the loader shows `what` and `mend` with file, line and key.

    Args:
        what: the fault, with the value found.
        mend: what to write instead.
        key: the key at fault, where that is not the one that the validator stands on.
    """
    # pydantic fills the message from the context; braces in the user's own text must not be taken for names in it
    return PydanticCustomError("refused", "{what}", {"what": what, "mend": mend, "key": key})
