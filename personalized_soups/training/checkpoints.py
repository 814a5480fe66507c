"""Manage the checkpoints of a training.

Checkpoints lie in a hidden folder next to the expert's folder. Each complete checkpoint has a mark: a file with the
sizes of the other files. A kill leaves at most one checkpoint without a mark, and the next run removes it. `run.json`
records the training's settings, so that a training never resumes from the checkpoints of a different training.
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
    """Return the hidden folder for the checkpoints of the training that writes its expert to `out`."""
    return out.parent / f".{out.name}.training"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Lock the folder of the checkpoints while the block runs, so that only one run at a time trains into `out`.

    A killed run loses its lock. If a run was killed within `remove`, the files that `remove` left are deleted.

    Raises:
        OutputExistsError: if another run holds the lock.
        UsageError: if the folder cannot be made.
    """
    partial = partial_folder(out)
    with workplace.held(partial, out):
        shutil.rmtree(_done(partial), ignore_errors=True)
        yield


def mark_complete(checkpoint: Path) -> None:
    """Mark `checkpoint` as complete. The mark records the size of every file, and appears by a single rename."""
    sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file() and path.name != MARK}
    scratch = checkpoint / f"{MARK}.partial"
    scratch.write_text(json.dumps(sizes), encoding="utf-8")
    scratch.replace(checkpoint / MARK)


def is_complete(checkpoint: Path) -> bool:
    """Return whether `checkpoint` has a mark and every file has the size that the mark records."""
    try:
        sizes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def last_complete(partial: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, or None if no checkpoint is complete."""
    complete = [folder for folder in partial.glob("checkpoint-*") if is_complete(folder)]
    return max(complete, key=_steps, default=None)


def prepare(partial: Path, run: dict[str, Any], *, resume: bool) -> Path | None:
    """Prepare the folder of the checkpoints, and return the checkpoint to resume from.

    If no checkpoint is complete, None is returned, and the training starts from the beginning. Incomplete checkpoints
    are removed.

    Args:
        partial: the folder of the checkpoints.
        run: the training's settings. A resumed training must have the settings of the interrupted training.
        resume: whether to resume.

    Raises:
        OutputExistsError: if the folder holds a complete checkpoint and `resume` is false.
        UsageError: if the checkpoints belong to a training with other settings.
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
    """Remove the folder of the checkpoints unless it holds a complete checkpoint."""
    if last_complete(partial) is None:
        shutil.rmtree(partial, ignore_errors=True)


def remove(partial: Path) -> None:
    """Remove the folder of a finished training.

    The folder is renamed first, so that a kill never leaves the folder with only a part of its files.
    """
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
        changes = "; ".join(
            f"{key} was {_short(begun.get(key))} and is now {_short(run.get(key))}" for key in differing
        )
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
