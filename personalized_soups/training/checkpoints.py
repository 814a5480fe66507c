"""Where a training stands while it runs: checkpoints beside the expert's folder, each with a mark once it is whole.

A kill at any moment leaves at most one checkpoint without its mark; it is skipped and removed. `run.json` says what is
being trained, so that a training never goes on from another one's steps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from personalized_soups.errors import OutputExistsError, UsageError
from personalized_soups.files import workplace

MARK = "complete.json"
_RUN = "run.json"


def partial_folder(out: Path) -> Path:
    """Return the folder of the checkpoints of the expert that will be written to `out`: hidden, beside it."""
    return out.parent / f".{out.name}.training"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the folder of the checkpoints while the block runs, so that one run at a time trains into `out`.

    A run that is killed holds it no longer. What a kill within `remove` left is taken away.

    Raises:
        OutputExistsError: if another run holds it.
        UsageError: if no folder can be made there.
    """
    partial = partial_folder(out)
    with workplace.held(partial, out):
        shutil.rmtree(_done(partial), ignore_errors=True)
        yield


def mark_complete(checkpoint: Path) -> None:
    """Record that every file of `checkpoint` is written, with its size; the mark appears by one rename."""
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file() and path.name != MARK}
    scratch = checkpoint / f"{MARK}.partial"
    scratch.write_text(json.dumps(sizes), encoding="utf-8")
    scratch.replace(checkpoint / MARK)


def is_complete(checkpoint: Path) -> bool:
    """Return whether `checkpoint` bears its mark and every file that the mark names has its size."""
    try:
        sizes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_complete(partial: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, or None where there is none."""
    complete = [folder for folder in partial.glob("checkpoint-*") if is_complete(folder)]
    return max(complete, key=_steps, default=None)


def prepare(partial: Path, run: dict[str, Any], *, resume: bool) -> Path | None:
    """Make the folder ready for a training described by `run`, and return the checkpoint from which it goes on.

    Incomplete checkpoints are removed.

    Raises:
        OutputExistsError: if there are checkpoints already and `resume` is false.
        UsageError: if they are those of another training.
    """
    if not resume and last_complete(partial) is not None:
        raise OutputExistsError(
            "an interrupted training stands here",
            where=str(partial),
            mend="pass resume=True to go on from its last checkpoint, or delete the folder to start again",
        )
    checkpoint = last_complete(partial)
    if checkpoint is not None:
        _check_same_run(partial, run)
    for folder in partial.glob("checkpoint-*"):
        if not is_complete(folder):
            shutil.rmtree(folder)
    partial.mkdir(parents=True, exist_ok=True)
    scratch = partial / f"{_RUN}.partial"
    scratch.write_text(json.dumps(run, indent=2), encoding="utf-8")
    scratch.replace(partial / _RUN)
    return checkpoint


def remove_if_useless(partial: Path) -> None:
    """Remove the folder unless a training can go on from it."""
    if last_complete(partial) is None:
        shutil.rmtree(partial, ignore_errors=True)


def remove(partial: Path) -> None:
    """Remove the folder: the expert is written. First out of sight by one rename, so that no half of it is left."""
    gone = _done(partial)
    shutil.rmtree(gone, ignore_errors=True)
    partial.replace(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _done(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.done")


def _check_same_run(partial: Path, run: dict[str, Any]) -> None:
    try:
        begun = json.loads((partial / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        begun = {}
    run = json.loads(json.dumps(run))
    differing = sorted(key for key in {*begun, *run} if begun.get(key) != run.get(key))
    if differing:
        told = "; ".join(f"{key} was {_short(begun.get(key))}, is now {_short(run.get(key))}" for key in differing)
        raise UsageError(
            f"the interrupted training was another one: {told}",
            where=str(partial),
            mend="resume with the same options, or delete the folder to start again",
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _steps(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
