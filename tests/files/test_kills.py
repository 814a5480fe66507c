"""Runs that are killed at every step, and at random moments: the output is absent or whole, and the next run succeeds.

killing.py forks the runs and kills them; here is judged what it found. `events` kills before every call that reaches
for the file system, one after another, so that no moment between two of them is left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads Linux's own signs of a killed run")

PIECES = ["one", "two/a", "two/b", "three", "four"]
ROOT = Path(__file__).parents[2]
BUSY = "refused: another run is writing this output"
THERE = "refused: the output folder exists already"


def findings(folder: Path, *arguments: str, count: int = 40) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.files.killing", *arguments, str(count), str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, timeout=280)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_rerun(found: dict[str, Any], *, overwrite: bool) -> None:
    assert found["after_rerun"] == "new"
    assert found["left"] == ["out"]
    refused = not overwrite and found["after_kill"] == "new"
    assert (found["again"] == [THERE]) == refused


@pytest.mark.parametrize("mode", ["events", "random"])
def test_a_new_folder_is_absent_or_whole(tmp_path: Path, mode: str) -> None:
    found = findings(tmp_path, mode, "plain", "none", "one step")
    assert len(found) >= 30
    assert {each["after_kill"] for each in found} == {"absent", "new"}
    for each in found:
        check_rerun(each, overwrite=False)


@pytest.mark.parametrize("mode", ["events", "random"])
def test_an_overwritten_folder_is_the_old_or_the_new_at_every_moment(tmp_path: Path, mode: str) -> None:
    found = findings(tmp_path, mode, "plain", "old", "one step")
    assert len(found) >= 30
    assert {each["after_kill"] for each in found} == {"old", "new"}
    for each in found:
        check_rerun(each, overwrite=True)


def test_where_folders_cannot_be_exchanged_one_moment_has_neither_and_the_next_run_mends_it(tmp_path: Path) -> None:
    found = findings(tmp_path, "events", "plain", "old", "two renames")
    assert {each["after_kill"] for each in found} == {"old", "new", "absent"}
    assert sum(each["after_kill"] == "absent" for each in found) == 1
    for each in found:
        check_rerun(each, overwrite=True)


@pytest.mark.parametrize(("kind", "old"), [("plain", "old"), ("resumable", "none")])
def test_where_only_files_can_be_locked_the_next_run_clears_what_a_kill_left(
    tmp_path: Path, kind: str, old: str
) -> None:
    found = findings(tmp_path, "events", kind, old, "file locks")
    assert len(found) >= 30
    assert {each["after_kill"] for each in found} == {"old" if old == "old" else "absent", "new"}
    for each in found:
        check_rerun(each, overwrite=old == "old")


@pytest.mark.parametrize("old", ["old", "none"])
def test_a_new_file_is_absent_or_whole_and_the_next_run_clears_what_a_kill_left(tmp_path: Path, old: str) -> None:
    found = findings(tmp_path, "events", "file", old, "one step")
    assert len(found) >= 6
    assert {each["after_kill"] for each in found} == {"old" if old == "old" else "absent", "new"}
    for each in found:
        check_rerun(each, overwrite=True)


@pytest.mark.parametrize("mode", ["events", "random"])
@pytest.mark.parametrize("old", ["old", "none"])
def test_what_was_marked_before_the_kill_is_not_written_again(tmp_path: Path, mode: str, old: str) -> None:
    found = findings(tmp_path, mode, "resumable", old, "one step")
    assert len(found) >= 30
    num_kept = set()
    for each in found:
        assert each["after_kill"] in {"old" if old == "old" else "absent", "new"}
        check_rerun(each, overwrite=old == "old")
        begun = [line.removeprefix("marking ") for line in each["lines"] if line.startswith("marking ")]
        marked = [line.removeprefix("marked ") for line in each["lines"] if line.startswith("marked ")]
        again = [line.removeprefix("marked ") for line in each["again"] if line.startswith("marked ")]
        if each["after_kill"] == "new":  # in its place: there is nothing to go on with
            assert again == (PIECES if old == "old" else [])
            continue
        if marked == PIECES and again == PIECES:
            # killed in the steps of the swap, between which the folder is no longer the journal's
            assert old == "old"
            continue
        assert again in (PIECES[len(marked) :], PIECES[len(begun) :])
        num_kept.add(len(PIECES) - len(again))
    if mode == "events":  # at random moments, a busy machine may kill most runs at the same point
        assert len(num_kept) >= 3


def test_of_runs_that_begin_at_once_one_wins_and_the_others_say_so(tmp_path: Path) -> None:
    found = findings(tmp_path, "race", "plain", "none", "one step", count=30)
    assert len(found) == 30
    for each in found:
        assert sorted(code for code, _ in each["runs"]) == [0, 2, 2, 2, 2]
        assert [lines for code, lines in each["runs"] if code == 0] == [["working"]]
        assert {line for code, lines in each["runs"] if code == 2 for line in lines} <= {BUSY, THERE}
        assert each["after"] == "new"
        assert each["left"] == ["out"]
    assert any([BUSY] in [lines for _, lines in each["runs"]] for each in found)
