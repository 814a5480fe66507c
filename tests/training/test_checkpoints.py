from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from personalized_soups.errors import OutputExistsError, UsageError
from personalized_soups.training import checkpoints

RUN = {"side": "friendly", "seed": 0}


def _checkpoint(partial: Path, steps: int, *, complete: bool) -> Path:
    folder = partial / f"checkpoint-{steps}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"x" * steps)
    if complete:
        checkpoints.mark_complete(folder)
    return folder


def test_only_a_marked_checkpoint_counts_and_the_one_with_most_steps_wins(tmp_path: Path) -> None:
    partial = checkpoints.partial_folder(tmp_path / "friendly")
    assert checkpoints.last_complete(partial) is None
    _checkpoint(partial, 9, complete=True)
    tenth = _checkpoint(partial, 10, complete=True)
    _checkpoint(partial, 20, complete=False)
    assert checkpoints.last_complete(partial) == tenth


@pytest.mark.parametrize("fault", ["cut", "missing", "mark"])
def test_a_checkpoint_whose_files_are_not_what_its_mark_says_is_incomplete(tmp_path: Path, fault: str) -> None:
    folder = _checkpoint(tmp_path, 10, complete=True)
    assert checkpoints.is_complete(folder)
    if fault == "cut":
        (folder / "optimizer.pt").write_bytes(b"x")
    elif fault == "missing":
        (folder / "optimizer.pt").unlink()
    else:
        (folder / checkpoints.MARK).write_text('{"optimizer')
    assert not checkpoints.is_complete(folder)


def test_going_on_removes_what_is_incomplete(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    assert checkpoints.prepare(partial, RUN, resume=False) is None
    whole = _checkpoint(partial, 10, complete=True)
    cut = _checkpoint(partial, 20, complete=False)
    assert checkpoints.prepare(partial, RUN, resume=True) == whole
    assert not cut.exists()
    checkpoints.remove_if_useless(partial)
    assert whole.exists()


def test_without_resume_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    checkpoints.prepare(tmp_path, RUN, resume=False)
    checkpoints.prepare(tmp_path, RUN, resume=False)  # no checkpoint is saved yet
    _checkpoint(tmp_path, 10, complete=True)
    with pytest.raises(OutputExistsError) as caught:
        checkpoints.prepare(tmp_path, RUN, resume=False)
    assert "resume=True" in caught.value.mend


def test_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    checkpoints.prepare(tmp_path, RUN, resume=False)
    _checkpoint(tmp_path, 10, complete=True)
    with pytest.raises(UsageError, match="seed was 0 and is now 1"):
        checkpoints.prepare(tmp_path, {**RUN, "seed": 1}, resume=True)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UsageError, match="side was null"):
        checkpoints.prepare(tmp_path, RUN, resume=True)


def test_a_finished_training_leaves_nothing(tmp_path: Path) -> None:
    partial = checkpoints.partial_folder(tmp_path / "friendly")
    checkpoints.prepare(partial, RUN, resume=False)
    _checkpoint(partial, 10, complete=True)
    assert json.loads((partial / "run.json").read_text()) == RUN
    checkpoints.remove(partial)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_complete_checkpoint_is_removed(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    checkpoints.prepare(partial, RUN, resume=False)
    _checkpoint(partial, 10, complete=False)
    checkpoints.remove_if_useless(partial)
    assert not partial.exists()


_HOLDING = """
import sys
from pathlib import Path
from personalized_soups.training import checkpoints
with checkpoints.held(Path(sys.argv[1])):
    checkpoints.partial_folder(Path(sys.argv[1])).joinpath("run.json").touch()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_while_the_first_lives_and_no_lock_outlives_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "friendly"
    first = subprocess.Popen(
        [sys.executable, "-c", _HOLDING, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(OutputExistsError, match="another run is writing this output") as caught,
            checkpoints.held(out),
        ):
            pytest.fail("the block must not be entered")
        assert (caught.value.where, caught.value.exit_code) == (str(out), 2)
        with checkpoints.held(tmp_path / "concise"):
            pass
    finally:
        first.kill()
        first.communicate()
    with checkpoints.held(out):
        assert checkpoints.partial_folder(out).is_dir()


def test_what_a_kill_within_the_removal_left_is_taken_away(tmp_path: Path) -> None:
    out = tmp_path / "friendly"
    (tmp_path / ".friendly.training.done" / "checkpoint-3").mkdir(parents=True)
    with checkpoints.held(out):
        pass
    assert list(tmp_path.iterdir()) == []
