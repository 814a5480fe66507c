"""Checkpoints of a training that runs, in a hidden folder next to the expert's, each marked once it is complete.

A kill at any moment leaves at most one checkpoint without a mark, which the next run removes. `run.json` records the
training's settings, so that a training never resumes from the checkpoints of a different one.
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
    """Return the hidden folder, next to `out`, for the checkpoints of the expert that a training writes to `out`."""
    return out.parent / f".{out.name}.training"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Lock the folder of the checkpoints while the block runs, so that one run at a time trains into `out`.

    The lock of a killed run is released. Remains of a kill within `remove` are deleted.

    Raises:
        OutputExistsError: if another run holds the lock.
        UsageError: if the folder cannot be made.
    """
    partial = partial_folder(out)
    with workplace.held(partial, out):
        shutil.rmtree(_done(partial), ignore_errors=True)
        yield


def mark_complete(checkpoint: Path) -> None:
    """Record the size of every file of a complete `checkpoint`. The mark appears by one rename."""
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file() and path.name != MARK}
    scratch = checkpoint / f"{MARK}.partial"
    scratch.write_text(json.dumps(sizes), encoding="utf-8")
    scratch.replace(checkpoint / MARK)


def is_complete(checkpoint: Path) -> bool:
    """Return whether `checkpoint` has its mark and every file has the size that the mark records."""
    try:
        sizes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_complete(partial: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, or None if there is none."""
    complete = [folder for folder in partial.glob("checkpoint-*") if is_complete(folder)]
    return max(complete, key=_steps, default=None)


def prepare(partial: Path, run: dict[str, Any], *, resume: bool) -> Path | None:
    """Prepare the folder for a training, and return the checkpoint to resume from, or None to start.

    Incomplete checkpoints are removed.

    Args:
        partial: the folder of the checkpoints.
        run: the training's settings; a resumed training must have the same.
        resume: whether to resume.

    Raises:
        OutputExistsError: if the folder holds a complete checkpoint and `resume` is false.
        UsageError: if its checkpoints belong to a training with other settings.
    """
    if not resume and last_complete(partial) is not None:
        raise OutputExistsError(
            "the folder holds the checkpoints of an interrupted training",
            where=str(partial),
            mend="pass resume=True to continue from the last checkpoint, or delete the folder to start again",
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
    """Remove the folder unless it holds a checkpoint to resume from."""
    if last_complete(partial) is None:
        shutil.rmtree(partial, ignore_errors=True)


def remove(partial: Path) -> None:
    """Remove the folder of a finished training: rename it first, so that a kill leaves no partial folder."""
    renamed = _done(partial)
    shutil.rmtree(renamed, ignore_errors=True)
    partial.replace(renamed)
    shutil.rmtree(renamed, ignore_errors=True)


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
        changes = "; ".join(f"{key} was {_short(begun.get(key))}, is now {_short(run.get(key))}" for key in differing)
        raise UsageError(
            f"the interrupted training had other settings: {changes}",
            where=str(partial),
            mend="resume with the same options, or delete the folder to start again",
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _steps(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1
