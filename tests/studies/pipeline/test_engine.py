"""Steps run once, again only when something has changed, and go on after a kill at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from personalized_soups.errors import DeclarationError, FileFormatError, OutputExistsError
from personalized_soups.studies.pipeline.engine import plan, run_steps
from personalized_soups.studies.pipeline.run_folder import RunFolder, digest_of
from personalized_soups.studies.pipeline.steps import Step, in_order
from tests.studies.pipeline import steps_of_tests
from tests.studies.pipeline.steps_of_tests import LINES, WaitFor, small_run, step


def ran(folder: Path, steps: list[Step], workers: int = 1) -> list[str]:
    """Run the steps, and return the names of those that were run."""
    return [finished.name for finished in run_steps(steps, RunFolder(folder), workers=workers) if finished.was_run]


def planned(folder: Path, steps: list[Step]) -> dict[str, str]:
    return {each.step.name: each.state for each in plan(steps, RunFolder(folder))}


def test_each_step_runs_after_what_it_needs_and_only_once(tmp_path: Path) -> None:
    assert planned(tmp_path / "run", small_run()) == dict.fromkeys(("pool", "left", "right", "report"), "run")
    assert ran(tmp_path / "run", small_run()) == ["pool", "left", "right", "report"]
    text = (tmp_path / "run/steps/report/text.txt").read_text()
    assert text.splitlines()[0] == "report 0 left 3 pool 3 right 3 pool 3"
    assert planned(tmp_path / "run", small_run()) == dict.fromkeys(("pool", "left", "right", "report"), "done")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.txt")}
    assert ran(tmp_path / "run", small_run()) == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.txt")} == before
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert set(manifest["steps"]) == {"pool", "left", "right", "report"}
    assert manifest["steps"]["pool"]["num_bytes"] == len((tmp_path / "run/steps/pool/text.txt").read_bytes())


def test_a_change_runs_again_only_what_depends_on_it(tmp_path: Path) -> None:
    ran(tmp_path, small_run())
    changed = small_run(left="other")
    assert planned(tmp_path, changed) == {"pool": "done", "right": "done", "left": "run", "report": "maybe"}
    assert ran(tmp_path, changed) == ["left", "report"]
    assert "other 3" in (tmp_path / "steps/report/text.txt").read_text()
    assert ran(tmp_path, small_run()) == ["left", "report"]


def test_a_step_that_gives_the_same_files_again_changes_nothing_below(tmp_path: Path) -> None:
    ran(tmp_path, small_run())
    (tmp_path / "steps/pool/text.txt").unlink()
    assert ran(tmp_path, small_run()) == ["pool"]


def test_files_that_were_changed_by_hand_are_made_again(tmp_path: Path) -> None:
    ran(tmp_path, small_run())
    (tmp_path / "steps/left/text.txt").write_text("forged\n")
    assert ran(tmp_path, small_run()) == ["left"]


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_give_the_same_files(tmp_path: Path) -> None:
    ran(tmp_path / "one", small_run())
    assert sorted(ran(tmp_path / "two", small_run(), workers=2)) == ["left", "pool", "report", "right"]
    assert digest_of(tmp_path / "one/steps") == digest_of(tmp_path / "two/steps")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_step_runs_as_soon_as_all_that_it_needs_is_done(tmp_path: Path) -> None:
    """A long step that is ready from the beginning does not hold up a chain of others."""
    last = tmp_path / "steps" / "second" / "text.txt"
    long = Step("long", {}, (), WaitFor(last), where="recipe.yaml: long", is_result=True)
    steps = [long, step("first"), step("second", "first", is_result=True)]
    assert ran(tmp_path, steps, workers=2) == ["first", "second", "long"]


def killed_after(num_events: int, folder: Path) -> int:
    """Run the small run in a process, kill it after so many events, and return the number of events that were seen."""
    command = [sys.executable, "-m", steps_of_tests.__name__, str(folder), "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = 0
    for _ in process.stdout:
        seen += 1
        if seen == num_events:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    process.wait()
    return seen


@pytest.mark.slow
def test_a_kill_at_any_event_ends_with_the_same_files(tmp_path: Path) -> None:
    ran(tmp_path / "whole", small_run())
    whole = digest_of(tmp_path / "whole/steps")
    num_events = 4 * (LINES + 1)
    for num in range(1, num_events + 1):
        folder = tmp_path / f"killed-{num}"
        assert killed_after(num, folder) == num
        ran(folder, small_run())
        assert digest_of(folder / "steps") == whole, f"killed after {num} events"
        assert ran(folder, small_run()) == []


def test_an_interrupted_step_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class StoppedError(RuntimeError):
        pass

    def stop(name: str, content: object) -> None:
        if (name, content) == ("left", 1):
            raise StoppedError

    with pytest.raises(StoppedError):
        list(run_steps(small_run(), RunFolder(tmp_path), on_report=stop))
    assert (tmp_path / "work/left/text.txt").read_text().splitlines() == ["left 0 pool 3", "left 1 pool 3"]
    reports: list[tuple[str, object]] = []
    list(run_steps(small_run(), RunFolder(tmp_path), on_report=lambda *report: reports.append(report)))
    assert [content for name, content in reports if name == "left"] == [2, 3]
    # with other settings, the step begins again
    (tmp_path / "steps/left/text.txt").unlink()
    with pytest.raises(StoppedError):
        list(run_steps(small_run(), RunFolder(tmp_path), on_report=stop))
    ran(tmp_path, small_run(left="other"))
    assert (tmp_path / "steps/left/text.txt").read_text().splitlines()[0] == "other 0 pool 3"


def test_finished_files_that_were_not_recorded_are_kept(tmp_path: Path) -> None:
    ran(tmp_path, small_run())
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["steps"]["report"]  # as after a kill between moving the files and writing the manifest
    manifest.write_text(json.dumps(content))
    assert ran(tmp_path, small_run()) == []
    assert "report" in json.loads(manifest.read_text())["steps"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked(), pytest.raises(OutputExistsError, match="another run is using"):
        ran(tmp_path, small_run())
    assert ran(tmp_path, small_run()) == ["pool", "left", "right", "report"]


def test_folders_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match=r"not that of a run: 'thesis\.txt'"):
        ran(tmp_path, small_run())
    with pytest.raises(OutputExistsError, match="the path is a file"):
        ran(tmp_path / "thesis.txt", small_run())
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": {"pool": {"key": "x"}}}', '{"steps": 7}'])
def test_a_damaged_manifest_is_named(content: str, tmp_path: Path) -> None:
    ran(tmp_path, small_run())
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(FileFormatError, match="manifest of the run is damaged") as caught:
        ran(tmp_path, small_run())
    assert caught.value.where == str(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").unlink()
    assert ran(tmp_path, small_run()) == []  # the files say what they were made from


def test_circles_unknown_repeated_and_unused_steps_are_named() -> None:
    for steps, message, place in (
        ([step("a", "b"), step("b", "c"), step("c", "a", is_result=True)], "a -> b -> c -> a", "recipe.yaml: a"),
        ([step("a", "a", is_result=True)], "a -> a", "recipe.yaml: a"),
        ([step("poll"), step("a", "pool", is_result=True)], "needs 'pool', which is not declared", "recipe.yaml: a"),
        ([step("a"), step("a", is_result=True)], "declared twice", "recipe.yaml: a"),
        ([step("a"), step("b", is_result=True)], "no step uses the step 'a'", "recipe.yaml: a"),
    ):
        with pytest.raises(DeclarationError) as caught:
            in_order(steps)
        assert message in caught.value.what
        assert caught.value.where == place
    assert [each.name for each in in_order(small_run())] == ["pool", "left", "right", "report"]
