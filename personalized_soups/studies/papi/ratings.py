"""Read people's ratings of statements.

Shapes: P = people, M = statements.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personalized_soups.errors import FileFormatError, UsageError

PEOPLE, STATEMENTS, SPLIT = "papi_200.jsonl", "papi_items.csv", "papi_split.json"

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Ratings:
    """The ratings of all people.

    Attributes:
        ratings: [P, M], float64, from 1 to 5. A missing rating is NaN.
        statements: the text of each statement.
        known: the indices of the statements that questions may be about.
        unseen: the indices of the statements whose order is predicted.
    """

    ratings: Floats
    statements: tuple[str, ...]
    known: Indices
    unseen: Indices


def read_ratings(folder: Path) -> Ratings:
    """Read the three files of the study from a folder.

    - `papi_200.jsonl`: one person a line, with the keys i1, i2, ...; a rating of 0 is missing;
    - `papi_items.csv`: one statement a row, in the column `label_raw`;
    - `papi_split.json`: `train_index` has the numbers of the known statements, from 1, and `test_index` has the others.

    Raises:
        UsageError: if a file is missing.
        FileFormatError: if a file has other content.
    """
    for name in (PEOPLE, STATEMENTS, SPLIT):
        if not (folder / name).is_file():
            raise UsageError(
                f"the file {name} does not exist",
                where=str(folder),
                mend="give the folder with the PAPI data; its source is github.com/zhu-minjun/PAlign",
            )
    statements = _statements(folder / STATEMENTS)
    known, unseen = _split(folder / SPLIT, len(statements))
    return Ratings(_people(folder / PEOPLE, len(statements)), statements, known, unseen)


def _statements(path: Path) -> tuple[str, ...]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "label_raw" not in rows[0]:
        raise _malformed(path, "there is no column `label_raw`")
    return tuple(row["label_raw"] for row in rows)


def _split(path: Path, num_statements: int) -> tuple[Indices, Indices]:
    try:
        split = json.loads(path.read_text(encoding="utf-8"))
        known, unseen = (np.array(split[key], dtype=np.intp) - 1 for key in ("train_index", "test_index"))
    except (ValueError, KeyError, TypeError) as error:
        raise _malformed(path, f"train_index or test_index is not a list of numbers: {error}") from None
    both = np.concatenate([known, unseen])
    if len(np.unique(both)) != len(both) or both.min() < 0 or both.max() >= num_statements:
        raise _malformed(path, f"the numbers are not distinct numbers from 1 to {num_statements}")
    return known, unseen


def _people(path: Path, num_statements: int) -> Floats:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            person = json.loads(line)
            rows.append([float(person[f"i{at}"]) for at in range(1, num_statements + 1)])
        except (ValueError, KeyError, TypeError) as error:
            raise _malformed(path, f"line {number} is not a person with {num_statements} ratings: {error}") from None
    ratings = np.array(rows)
    if not np.isin(ratings, (0, 1, 2, 3, 4, 5)).all():
        raise _malformed(path, "a rating is not one of 0, 1, 2, 3, 4 and 5")
    return np.where(ratings == 0, np.nan, ratings)


def _malformed(path: Path, what: str) -> FileFormatError:
    return FileFormatError(what, where=str(path), mend="download the file again from github.com/zhu-minjun/PAlign")
