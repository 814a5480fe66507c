"""`Declared`, the base class of every model that people write in a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr
from pydantic_core import PydanticCustomError

KeyPath = tuple[str | int, ...]


class Places:
    """The line of each key of a declaration. All places are equal, so that equal declarations compare equal.

    Args:
        source: the file, or the name of an argument.
        lines: the line of each key, counted from 1; None where the source has no lines.
    """

    def __init__(self, source: str, lines: Mapping[KeyPath, int | None]) -> None:
        self.source = source
        self.lines = dict(lines)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places)

    def __hash__(self) -> int:
        return 0

    def of(self, path: KeyPath) -> str:
        """Return `file:line: key`. A key that is not in the file gets the line of the nearest key around it."""
        for end in range(len(path), 0, -1):
            if line := self.lines.get(path[:end]):
                return f"{self.source}:{line}: {dotted(path)}"
        return f"{self.source}: {dotted(path)}" if path else self.source


class Declared(BaseModel):
    """A model that people write in a file: unknown keys are rejected, types are strict, instances are frozen."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    _places: Places = PrivateAttr(default_factory=lambda: Places("", {}))

    def place(self, *path: str | int) -> str:
        """Return where a key was declared, as `file:line: key`, for the `where` of an error."""
        if self._places.source:
            return self._places.of(path)
        return f"{type(self).__name__} {dotted(path)}".rstrip()

    def with_places(self, places: Places) -> Self:
        """Store the file and the lines that the object was loaded from, and return the object."""
        self._places = places
        return self

    def replaced(self, **changes: Any) -> Self:
        """Return a checked copy with some fields changed (pydantic's `model_copy` does not check)."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_validate({**fields, **changes}).with_places(self._places)


def dotted(path: KeyPath) -> str:
    """Return a key path as people write it: `dimensions.style.sides`."""
    return ".".join(str(part) for part in path)


def refusal(what: str, *, mend: str, key: KeyPath = ()) -> PydanticCustomError:
    """Return the error for a validator to raise; the loader adds file, line and key to it.

    Args:
        what: the fault, with the value found.
        mend: what to write instead.
        key: the path from the validated key to the key at fault; empty if they are the same.
    """
    # pydantic formats the message with the context, so the user's text is passed in the context: it may contain braces
    return PydanticCustomError("refused", "{what}", {"what": what, "mend": mend, "key": key})
