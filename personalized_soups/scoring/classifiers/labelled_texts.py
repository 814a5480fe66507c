"""Texts that a user has labelled by file: one file or folder for each of the two classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from personalized_soups.errors import InputError
from personalized_soups.files.regular import check_no_lfs_pointer

_SUFFIXES = (".txt", ".md", ".jsonl")


class LabelledText(NamedTuple):
    """A text of one of two classes.

    Attributes:
        prompt: the prompt that the text answers. It may be empty.
        text: the text.
        is_high: whether the text is of the high end.
        group: texts of one group resemble each other, such as the answers to one prompt. They are held out together.
        where: the place of the text, for errors.
    """

    prompt: str
    text: str
    is_high: bool
    group: str
    where: str


def read_labelled_texts(high: Path, low: Path) -> list[LabelledText]:
    """Return the texts of both ends.

    Each line of a `.jsonl` file is an object with a `text` or an `answer`. It may have a `prompt` and a `group`; the
    group of a text is its prompt by default. Each line of another file is a text. In a folder, each `.txt` and `.md`
    file is one text, and each line of a `.jsonl` file is one.

    Raises:
        InputError: if a file cannot be read or holds no text, or a line is not such an object.
    """
    return [*_texts(high, is_high=True), *_texts(low, is_high=False)]


def check_texts(texts: Sequence[LabelledText], *, num_least: int) -> list[LabelledText]:
    """Return the texts, each once.

    Raises:
        InputError: if a class has fewer than `num_least` texts or fewer than 2 groups, or a text is in both classes.
    """
    first = {text.text: text for text in reversed(texts)}
    for text in texts:
        other = first[text.text]
        if other.is_high != text.is_high:
            raise InputError(
                f"the same text is in both classes: {text.text[:60]!r} (also at {other.where})",
                where=text.where,
                mend="remove it from one of the two",
            )
    unique = [text for text in texts if first[text.text] is text]
    for is_high, name in ((True, "high"), (False, "low")):
        own = [text for text in unique if text.is_high == is_high]
        num_groups = len({text.group for text in own})
        if len(own) < num_least or num_groups < 2:
            raise InputError(
                f"the {name} class has {len(own)} different texts in {num_groups} groups, but at least {num_least} "
                "texts in 2 groups are needed",
                where=own[0].where if own else f"the {name} class",
                mend="give more texts; a few hundred are better",
            )
    return unique


def _texts(path: Path, *, is_high: bool) -> list[LabelledText]:
    files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES) if path.is_dir() else [path]
    texts = [text for file in files for text in _of_file(file, is_high=is_high, is_whole=path.is_dir())]
    if not texts:
        raise InputError(
            "the folder holds no text" if path.is_dir() else "the file holds no text",
            where=str(path),
            mend=f"give a file with one text on each line, or a folder of {', '.join(_SUFFIXES)} files",
        )
    return texts


def _of_file(path: Path, *, is_high: bool, is_whole: bool) -> Iterator[LabelledText]:
    try:
        data = path.read_bytes()
        check_no_lfs_pointer(data, path)
        content = data.decode("utf-8-sig")
    except OSError as fault:
        raise InputError(
            f"the texts can't be read: {fault.strerror}", where=str(path), mend="check the path"
        ) from fault
    except UnicodeDecodeError as fault:
        raise InputError(f"the file is not UTF-8: {fault}", where=str(path), mend="save the file as UTF-8") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                yield _of_line(line, f"{path}:{number}", is_high=is_high)
        return
    lines = [content] if is_whole else content.split("\n")
    for number, line in enumerate(lines, start=1):
        where = str(path) if is_whole else f"{path}:{number}"
        if line.strip():
            yield LabelledText("", line.strip(), is_high, where, where)


def _of_line(line: str, where: str, *, is_high: bool) -> LabelledText:
    try:
        row: Any = json.loads(line)
        text = row["text"] if "text" in row else row["answer"]
        prompt, group = row.get("prompt", ""), row.get("group")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        text = prompt = group = None
    is_sound = isinstance(text, str) and bool(text.strip()) and isinstance(prompt, str)
    if not is_sound or not isinstance(group, str | None):
        raise InputError(
            'the line is not a JSON object with a "text" or an "answer"',
            where=where,
            mend='write {"text": "..."} on every line; "prompt" and "group" may be added, as strings',
        )
    return LabelledText(prompt, text.strip(), is_high, group or prompt or where, where)


def num_per_class(texts: Sequence[LabelledText]) -> dict[str, int]:
    """Return the number of texts of the classes `high` and `low`."""
    counts = Counter("high" if text.is_high else "low" for text in texts)
    return {"high": counts["high"], "low": counts["low"]}
