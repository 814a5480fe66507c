"""Read records: JSON files that this package writes next to tensors, as declared models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from personalized_soups.declare.declared import Declared, dotted
from personalized_soups.errors import FileFormatError
from personalized_soups.files.regular import read_small
from personalized_soups.files.strict_json import parse_json

RecordT = TypeVar("RecordT", bound=Declared)


def read_record(model: type[RecordT], path: Path, *, what: str, max_bytes: int, mend: str) -> RecordT:
    """Return the record in a JSON file.

    Args:
        model: the declared model of the record.
        path: the file.
        what: the thing that the record describes, such as `classifier`, for errors.
        max_bytes: the largest size of a record. A larger file is not read.
        mend: how a damaged record is replaced, for errors.

    Raises:
        FileFormatError: if the file is not JSON, or lacks a key or has another one.
        InputError: if the file cannot be read.
    """
    content = parse_json(read_small(path, max_bytes), path)
    try:
        return model.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise FileFormatError(
            f"the record of the {what} is damaged: {dotted(first['loc'])}: {first['msg']}", where=str(path), mend=mend
        ) from error
