"""`Declared`, the base class of all pydantic models that people write in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr
from pydantic_core import PydanticCustomError

KeyPath = tuple[str | int, ...]


class Places:
    """The line number of each key in a declaration.

    All objects of this class compare equal, so declarations with equal values from different files compare equal.

    Args:
        source: the path of the file, or the name of the argument that holds the declaration.
        lines: the line number of each key, counted from 1. It is None if the source has no lines.
    """

    def __init__(self, source: str, lines: Mapping[KeyPath, int | None]) -> None:
        self.source = source
        self.lines = dict(lines)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places)

    def __hash__(self) -> int:
        return 0

    def of(self, path: KeyPath) -> str:
        """Return `file:line: key`. If the key is not in the file, the line of the nearest key around it is used."""
        for end in range(len(path), 0, -1):
            if line := self.lines.get(path[:end]):
                return f"{self.source}:{line}: {dotted(path)}"
        return f"{self.source}: {dotted(path)}" if path else self.source


class Declared(BaseModel):
    """A pydantic model that people write in a file. Unknown keys and wrong types are rejected. Objects are frozen."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    _places: Places = PrivateAttr(default_factory=lambda: Places("", {}))

    def place(self, *path: str | int) -> str:
        """Return the place of a key as `file:line: key`, for the `where` of an error."""
        if self._places.source:
            return self._places.of(path)
        return f"{type(self).__name__} {dotted(path)}".rstrip()

    def relative_path(self, path: str) -> Path:
        """Return a path that the file names. A relative path starts at the folder of the file."""
        return Path(self._places.source).parent / path

    def with_places(self, places: Places) -> Self:
        """Store the file and the line numbers from which this object was loaded, and return this object."""
        self._places = places
        return self

    def replaced(self, **changes: Any) -> Self:
        """Return a copy with some fields changed. All values are checked, unlike in pydantic's `model_copy`."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self).model_validate({**fields, **changes}).with_places(self._places)


def dotted(path: KeyPath) -> str:
    """Return a key path with dots between its parts, such as `dimensions.style.sides`."""
    return ".".join(str(part) for part in path)


def refusal(what: str, *, mend: str, key: KeyPath = ()) -> PydanticCustomError:
    """Return an error that a validator of a declared model raises. The loader adds the file, the line and the key.

    Args:
        what: what is wrong, with the value found.
        mend: how to fix it.
        key: the path from the validated key to the wrong key. It is empty if both are the same key.
    """
    # The user's text may contain braces, so it is not passed as the template but as a value that pydantic inserts.
    return PydanticCustomError("refused", "{what}", {"what": what, "mend": mend, "key": key})
