"""Read comparisons that people made, to measure a judge's agreement with them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from personalized_soups.declare.preference_data import Verdict
from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.evaluation.judge_report import HumanComparison
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers

_PREFERRED: tuple[Verdict, ...] = ("first", "second", "tie")
# Fine-Grained RLHF (https://github.com/allenai/FineGrainedRLHF) lists its six preferences in this order of its four
# predictions: 1 and 2 name the better one of a pair, and 0 is a tie.
_PREDICTIONS = tuple(itertools.combinations(range(1, 5), 2))
_FINE_GRAINED: dict[int, Verdict] = {0: "tie", 1: "first", 2: "second"}


def read_human_comparisons(path: Path, *, criterion: str = "") -> list[HumanComparison]:
    """Return the comparisons of a file.

    The file has one of two formats. JSON Lines have the keys `prompt`, `first`, `second`, `preferred` (`first`,
    `second` or `tie`) and optionally `criterion`. A JSON list is read as the feedback data of Fine-Grained RLHF: four
    predictions to a question with passages, and the six preferences between them.

    Args:
        path: the file.
        criterion: the criterion of comparisons that name none.

    Raises:
        InputError: if the file cannot be read or has no comparison.
        FileFormatError: if a line or an entry has another format.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"the comparisons cannot be read: {reason}", where=str(path), mend="give a file of JSON in UTF-8"
        ) from error
    found = list(_fine_grained(text, path, criterion) if text.lstrip()[:1] == "[" else _lines(text, path, criterion))
    if not found:
        raise InputError("the file has no comparisons", where=str(path), mend="give a file with at least one")
    return found


def _lines(text: str, path: Path, criterion: str) -> Iterator[HumanComparison]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _of_row(json.loads(line), criterion)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FileFormatError(
                f"the line is not a comparison: {_reason(error)}",
                where=f"{path}:{number}",
                mend='write {"prompt": "...", "first": "...", "second": "...", "preferred": "first"}',
            ) from None


def _of_row(row: Any, criterion: str) -> HumanComparison:
    texts = [row["prompt"], row["first"], row["second"], row.get("criterion", criterion)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("prompt, first, second and criterion must be texts")
    if row["preferred"] not in _PREFERRED:
        raise ValueError(f"preferred is {row['preferred']!r}, but must be first, second or tie")
    return HumanComparison(ComparedAnswers(*texts), row["preferred"])


def _fine_grained(text: str, path: Path, criterion: str) -> Iterator[HumanComparison]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the file is not JSON: {error}", where=str(path), mend="give the whole file") from None
    for number, entry in enumerate(entries):
        try:
            yield from _of_entry(entry, criterion)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FileFormatError(
                f"the entry is not one of Fine-Grained RLHF: {_reason(error)}",
                where=f"{path}: entry {number}",
                mend="give tasks/qa_feedback/data/*.json of Fine-Grained RLHF, or JSON Lines of comparisons",
            ) from None


def _of_entry(entry: Any, criterion: str) -> Iterator[HumanComparison]:
    passages = "\n".join(" ".join(passage[1:]) for passage in entry["passages"])
    prompt = f"{entry['question']}\n\nAnswer from these passages:\n{passages}"
    for (first, second), preferred in zip(_PREDICTIONS, entry["preference"], strict=True):
        answers = ComparedAnswers(
            prompt, str(entry[f"prediction {first}"]), str(entry[f"prediction {second}"]), criterion
        )
        yield HumanComparison(answers, _FINE_GRAINED[preferred])


def _reason(error: Exception) -> str:
    return f"the key {error} is missing or wrong" if isinstance(error, KeyError) else str(error)
