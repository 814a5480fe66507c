from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from personalized_soups.errors import OutputExistsError, RunError, UsageError
from personalized_soups.files import swap
from personalized_soups.files.atomic import new_file, new_folder
from personalized_soups.files.workplace import held
from tests.files.killing import locking_only_files


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_and_raise(target: Path, fault: BaseException, *, overwrite: bool = False) -> None:
    with new_folder(target, overwrite) as scratch:
        (scratch / "soup.json").write_text("{}")
        raise fault


def written(target: Path, what: str, *, overwrite: bool = False) -> Path:
    with new_folder(target, overwrite) as scratch:
        (scratch / "soup.json").write_text(json.dumps({"is": what}))
    return target


def what_is(target: Path) -> str:
    return str(json.loads((target / "soup.json").read_text())["is"])


def test_the_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with new_folder(target) as scratch:
        (scratch / "x.txt").write_text("x")
        assert not target.exists()
    assert left_in(tmp_path / "a") == ["out"]
    assert (target / "x.txt").read_text() == "x"


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_raises(tmp_path: Path, fault: type[BaseException]) -> None:
    with pytest.raises(fault):
        write_and_raise(tmp_path / "made" / "out", fault())
    assert left_in(tmp_path) == []


def test_a_full_disk_is_a_failed_run_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no space is left") as caught:
        write_and_raise(tmp_path / "out", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert caught.value.exit_code == 1
    assert caught.value.where == str(tmp_path / "out")
    assert left_in(tmp_path) == []


def test_an_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="exists already") as caught, new_folder(tmp_path / "out"):
        pytest.fail("the block must not be entered")
    assert "overwrite=True" in caught.value.mend


def test_overwrite_replaces_what_this_tool_wrote(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.safetensors").write_text("old")
    (target / "soup.json").write_text(json.dumps({"files": ["old.safetensors", "soup.json"]}))
    with new_folder(target, overwrite=True) as scratch:
        (scratch / "soup.json").write_text("{}")
    assert left_in(tmp_path) == ["out"]
    assert left_in(target) == ["soup.json"]


def test_overwrite_keeps_files_that_this_tool_did_not_write(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "notes").mkdir(parents=True)
    (target / "notes" / "mine.txt").write_text("mine")
    (target / "soup.json").write_text(json.dumps({"files": ["soup.json"]}))
    with new_folder(target, overwrite=True) as scratch:
        (scratch / "soup.json").write_text("{}")
    assert left_in(tmp_path) == ["out", "out.replaced-1"]
    assert (tmp_path / "out.replaced-1" / "notes" / "mine.txt").read_text() == "mine"


def test_overwrite_refuses_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="did not write"), new_folder(tmp_path / "thesis", overwrite=True):
        pytest.fail("the block must not be entered")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_a_failed_overwrite_leaves_the_old_folder_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "soup.json").write_text('{"old": 1}')
    with pytest.raises(ValueError, match="half way"):
        write_and_raise(target, ValueError("half way"), overwrite=True)
    assert left_in(tmp_path) == ["out"]
    assert (target / "soup.json").read_text() == '{"old": 1}'


def test_a_target_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "out"
    block = new_folder(target)
    block.__enter__()
    target.mkdir()
    (target / "theirs.txt").write_text("theirs")
    with pytest.raises(OutputExistsError, match="exists already"):
        block.__exit__(None, None, None)
    assert left_in(tmp_path) == ["out"]
    assert left_in(target) == ["theirs.txt"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_files_and_links_are_refused_even_with_overwrite(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("x")
    else:
        (tmp_path / "real").mkdir()
        target.symlink_to(tmp_path / "real")
    with pytest.raises(OutputExistsError, match=f"a {kind}"), new_folder(target, overwrite=True):
        pytest.fail("the block must not be entered")


def test_the_root_folder_is_no_output() -> None:
    with pytest.raises(UsageError), new_folder("/", overwrite=True):
        pytest.fail("the block must not be entered")


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS, errno.ENOENT])
def test_a_parent_that_takes_no_folder_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error), str(self))

    monkeypatch.setattr(Path, "mkdir", lambda self, *a, **k: refuse(self) if self.suffix == ".partial" else None)
    with pytest.raises(UsageError, match="cannot be made") as caught, new_folder(tmp_path / "out"):
        pytest.fail("the block must not be entered")
    assert caught.value.where == str(tmp_path / "out")


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_too_long_for_the_file_system_is_a_usage_error(tmp_path: Path, length: int) -> None:
    with pytest.raises(UsageError, match="cannot be made: File name too long"), new_folder(tmp_path / ("x" * length)):
        pytest.fail("the block must not be entered")
    assert left_in(tmp_path) == []


def test_a_file_size_limit_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="File too large"):
        write_and_raise(tmp_path / "out", OSError(errno.EFBIG, os.strerror(errno.EFBIG)))
    assert left_in(tmp_path) == []


STEPS = {True: 1, False: 4}  # renames of a swap where the system can exchange two folders, and where it cannot


@pytest.mark.parametrize(("can_exchange", "step"), [(can, step) for can, last in STEPS.items() for step in range(last)])
def test_ctrl_c_after_any_step_of_a_swap_leaves_the_old_folder_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool, step: int
) -> None:
    target = written(tmp_path / "out", "old")
    rename = Path.rename
    seen: list[str] = []

    def renaming(self: Path, to: Path) -> Path:
        done = rename(self, to)
        seen.append(self.name)
        if len(seen) == step + 1:
            raise KeyboardInterrupt
        return done

    if not can_exchange:
        monkeypatch.setattr(swap, "exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", renaming)
    with pytest.raises(KeyboardInterrupt), new_folder(target, overwrite=True) as scratch:
        (scratch / "soup.json").write_text('{"is": "new"}')
    assert left_in(tmp_path) == ["out"]
    assert what_is(target) == ("new" if step == 3 else "old")


def note_renames(monkeypatch: pytest.MonkeyPatch, notes: list[str], form: str) -> None:
    rename = Path.rename

    def renaming(self: Path, to: Path) -> Path:
        notes.append(form.format(self.name))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", renaming)


@pytest.mark.parametrize("can_exchange", STEPS)
def test_a_swap_takes_as_many_steps_as_are_interrupted_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    renamed: list[str] = []
    note_renames(monkeypatch, renamed, "{}")
    if not can_exchange:
        monkeypatch.setattr(swap, "exchange", lambda *_: False)
    written(tmp_path / "out", "old")
    written(tmp_path / "out", "new", overwrite=True)
    assert what_is(tmp_path / "out") == "new"
    assert len(renamed) - 1 == STEPS[can_exchange]  # one put the first folder in place


def test_a_run_killed_between_the_two_renames_is_mended_by_the_next(tmp_path: Path) -> None:
    """The state between the two renames if folders cannot be exchanged: neither folder is in place."""
    target = written(tmp_path / "out", "old")
    place = tmp_path / ".out.partial"
    place.mkdir()
    target.rename(place / "old")
    (place / "new").mkdir()
    (place / "new" / "soup.json").write_text('{"is": "new"}')
    with pytest.raises(OutputExistsError, match="exists already"), new_folder(target):
        pytest.fail("the block must not be entered")
    assert what_is(target) == "old"
    written(target, "newer", overwrite=True)
    assert what_is(target) == "newer"
    assert left_in(tmp_path) == ["out"]


def test_files_of_others_outlive_a_run_that_was_killed_just_after_the_exchange(tmp_path: Path) -> None:
    target = written(tmp_path / "out", "new")
    old = tmp_path / ".out.partial" / "old"
    old.mkdir(parents=True)
    (old / "soup.json").write_text('{"files": ["soup.json"]}')
    (old / "mine.txt").write_text("mine")
    written(target, "newer", overwrite=True)
    assert left_in(tmp_path) == ["out", "out.replaced-1"]
    assert (tmp_path / "out.replaced-1" / "mine.txt").read_text() == "mine"


def test_the_second_of_two_runs_is_refused_before_any_work(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "x").write_text("first")
        with pytest.raises(OutputExistsError, match="another run is writing this output") as caught:
            new_folder(tmp_path / "out").__enter__()
    assert caught.value.where == str(tmp_path / "out")
    assert (tmp_path / "out" / "x").read_text() == "first"
    assert left_in(tmp_path) == ["out"]


def test_a_lock_on_a_folder_that_is_gone_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may end, and take its scratch away, between the opening and the locking of it."""
    flock = fcntl.flock
    is_first = True

    def late(descriptor: int, how: int) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            (tmp_path / ".out.partial").rmdir()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with new_folder(tmp_path / "out"), pytest.raises(OutputExistsError, match="another run"):
        new_folder(tmp_path / "out").__enter__()
    assert left_in(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_taken_away(tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial" / "new" / "deep"
    stale.mkdir(parents=True)
    (stale / "half.safetensors").write_bytes(b"half")
    (tmp_path / ".out.partial" / "journal").write_text("x")
    with new_folder(tmp_path / "out") as scratch:
        assert left_in(scratch) == []
    assert left_in(tmp_path) == ["out"]


def test_a_refused_run_takes_away_what_a_killed_one_left_too(tmp_path: Path) -> None:
    target = written(tmp_path / "out", "old")
    half = tmp_path / ".out.partial" / "new"
    half.mkdir(parents=True)
    (half / "half.safetensors").write_bytes(b"half")
    with pytest.raises(OutputExistsError, match="exists already"), new_folder(target):
        pytest.fail("the block must not be entered")
    assert left_in(tmp_path) == ["out"]
    assert what_is(target) == "old"


def test_a_refused_run_keeps_what_another_can_go_on_with(tmp_path: Path) -> None:
    target = written(tmp_path / "out", "old")
    place = tmp_path / ".out.partial"
    (place / "new").mkdir(parents=True)
    (place / "new" / "one").write_text("finished")
    (place / "journal").write_text('{"identity": "x"}\n"one"\n')
    with pytest.raises(OutputExistsError, match="exists already"), new_folder(target):
        pytest.fail("the block must not be entered")
    assert (place / "new" / "one").read_text() == "finished"
    assert left_in(place) == ["journal", "new"]


def test_where_only_files_can_be_locked_a_living_runs_scratch_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", locking_only_files(fcntl.flock))
    dead = tmp_path / ".out.0123abcd.partial" / "new"
    dead.mkdir(parents=True)
    (dead / "half").write_text("half")
    (tmp_path / ".out.notes.partial").mkdir()  # somebody else's
    living = new_folder(tmp_path / "out")
    scratch = living.__enter__()
    (scratch / "soup.json").write_text('{"is": "first"}')
    assert not dead.parent.exists()
    written(tmp_path / "out", "second")
    assert (scratch / "soup.json").read_text() == '{"is": "first"}'
    with pytest.raises(OutputExistsError, match="exists already"):
        living.__exit__(None, None, None)
    assert what_is(tmp_path / "out") == "second"
    assert left_in(tmp_path) == [".out.notes.partial", "out"]


def test_the_old_folder_in_a_dead_runs_own_scratch_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kill between the two renames of a swap leaves it where folders are neither exchanged nor locked."""
    monkeypatch.setattr(fcntl, "flock", locking_only_files(fcntl.flock))
    target = written(tmp_path / "out", "old")
    dead = tmp_path / ".out.0123abcd.partial"
    (dead / "new").mkdir(parents=True)
    target.rename(dead / "old")
    with pytest.raises(OutputExistsError, match="exists already"), new_folder(target):
        pytest.fail("the block must not be entered")
    assert what_is(target) == "old"
    assert left_in(tmp_path) == ["out"]


def test_a_scratch_that_is_taken_for_dead_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", locking_only_files(fcntl.flock))
    opened = os.open
    taken: list[str] = []

    def late(path: str | Path, *arguments: int, **options: int) -> int:
        if Path(path).name == "lock" and not taken:
            taken.append(str(path))
            shutil.rmtree(Path(path).parent)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", late)
    with new_folder(tmp_path / "out") as scratch:
        assert str(scratch.parent) not in taken[0]
        assert [path for path in tmp_path.iterdir() if path.name.endswith(".partial")] == [scratch.parent]
    assert left_in(tmp_path) == ["out"]


def test_a_new_file_replaces_the_old_one_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "pairs.jsonl"
    target.write_text("old")
    with pytest.raises(IsADirectoryError), new_file(target) as scratch:
        scratch.write_text(tmp_path.read_text())
    assert target.read_text() == "old"
    with new_file(target) as scratch:
        scratch.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert left_in(tmp_path) == ["pairs.jsonl"]


def test_a_new_file_leaves_a_living_runs_scratch_and_clears_a_dead_ones(tmp_path: Path) -> None:
    target = tmp_path / "pairs.jsonl"
    (tmp_path / ".pairs.jsonl.0123abcd.partial").write_text("dead")
    with new_file(target) as living:
        living.write_text("first")
        with new_file(target) as other:
            other.write_text("second")
        assert target.read_text() == "second"
        assert left_in(tmp_path) == sorted([living.name, "pairs.jsonl"])
    assert target.read_text() == "first"
    assert left_in(tmp_path) == ["pairs.jsonl"]


def test_a_scratch_file_that_is_gone_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may take it for a dead one's between the opening and the locking of it."""
    flock = fcntl.flock
    is_first = True

    def late(descriptor: int, how: int) -> None:
        nonlocal is_first
        if is_first:
            is_first = False
            for path in tmp_path.iterdir():
                path.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with new_file(tmp_path / "pairs.jsonl") as scratch:
        assert scratch.exists()
    assert left_in(tmp_path) == ["pairs.jsonl"]


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path: Path) -> None:
    check_held(tmp_path)


def test_a_folder_is_held_by_a_file_where_folders_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", locking_only_files(fcntl.flock))
    check_held(tmp_path)


def check_held(tmp_path: Path) -> None:
    folder, out = tmp_path / "deep" / ".x.training", tmp_path / "deep" / "x"
    with held(folder, out):
        with pytest.raises(OutputExistsError, match="another run is writing this output") as caught, held(folder, out):
            pytest.fail("the block must not be entered")
        assert caught.value.where == str(out)
    assert left_in(tmp_path) == []
    with held(folder, out):
        (folder / "checkpoint").mkdir()
    assert (folder / "checkpoint").is_dir()
    with held(folder, out):
        shutil.rmtree(folder)
    assert left_in(tmp_path / "deep") == []


def test_a_link_or_file_where_the_scratch_shall_be_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("x")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "theirs")
    (tmp_path / ".two.partial").write_text("a file")
    for name in ("out", "two"):
        with pytest.raises(UsageError, match="cannot be made"), new_folder(tmp_path / name):
            pytest.fail("the block must not be entered")
    assert left_in(tmp_path / "theirs") == ["x"]


def test_without_locks_every_run_has_a_scratch_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    one = new_folder(tmp_path / "out")
    one.__enter__()
    written(tmp_path / "out", "two")
    with pytest.raises(OutputExistsError, match="exists already"):
        one.__exit__(None, None, None)
    assert what_is(tmp_path / "out") == "two"
    assert left_in(tmp_path) == ["out"]


def test_a_durable_folder_is_on_the_disk_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    note_renames(monkeypatch, synced, "rename {}")
    with new_folder(tmp_path / "out", durable=True) as scratch:
        (scratch / "a").mkdir()
        (scratch / "a" / "x").write_text("x")
        (scratch / "y").write_text("y")
    assert synced == ["y", "new", "x", "a", "rename new", tmp_path.name]
    synced.clear()
    written(tmp_path / "two", "two")
    assert synced == ["rename new"]
