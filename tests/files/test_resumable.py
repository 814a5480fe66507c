from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from personalized_soups.errors import InputError, OutputExistsError, RunError, UsageError
from personalized_soups.files import journal as journal_module
from personalized_soups.files.atomic import new_folder, resumable_folder

PIECES = ("one.bin", "users/two/a.bin", "users/three", "four.bin")


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_piece(folder: Path, name: str, text: str) -> None:
    path = folder / name if name.endswith(".bin") else folder / name / "within.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(
    target: Path,
    *,
    fault: BaseException | None = None,
    after: int = len(PIECES),
    identity: str = "soup 1",
    overwrite: bool = False,
    durable: bool = False,
) -> list[str]:
    """Write all pieces that are not done, raise `fault` after so many of them; return those that were written."""
    wrote: list[str] = []
    with resumable_folder(target, identity, overwrite, durable=durable) as work:
        for name in PIECES:
            if name not in work.done:
                if len(wrote) == after and fault is not None:
                    write_piece(work.folder, name, "half")
                    raise fault
                write_piece(work.folder, name, f"{identity}: {name}")
                work.mark(name)
                wrote.append(name)
        (work.folder / "soup.json").write_text("{}")
    return wrote


def read_below(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def whole(identity: str = "soup 1") -> dict[str, str]:
    paths = {name: name if name.endswith(".bin") else f"{name}/within.bin" for name in PIECES}
    return {**{paths[name]: f"{identity}: {name}" for name in PIECES}, "soup.json": "{}"}


def test_a_run_without_interruption_is_a_new_folder(tmp_path: Path) -> None:
    assert run(tmp_path / "out") == list(PIECES)
    assert read_below(tmp_path / "out") == whole()
    assert left_in(tmp_path) == ["out"]


@pytest.mark.parametrize("after", range(1, len(PIECES)))
@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interrupted_run_is_gone_on_with(
    tmp_path: Path, after: int, fault: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(fault):
        run(tmp_path / "out", fault=fault(), after=after)
    assert left_in(tmp_path) == [".out.partial"]
    assert str(tmp_path / ".out.partial") in caplog.text
    assert run(tmp_path / "out") == list(PIECES[after:])
    assert read_below(tmp_path / "out") == whole()
    assert left_in(tmp_path) == ["out"]


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "made" / "out", fault=KeyboardInterrupt(), after=0)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("fault", [InputError, UsageError])
def test_bad_input_found_half_way_leaves_nothing(tmp_path: Path, fault: type[InputError | UsageError]) -> None:
    with pytest.raises(fault):
        run(tmp_path / "out", fault=fault("NaN", where="an expert", mend="train it again"), after=2)
    assert left_in(tmp_path) == []


def test_a_run_of_another_identity_begins_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", fault=KeyboardInterrupt(), after=2)
    assert run(tmp_path / "out", identity="soup 2") == list(PIECES)
    assert read_below(tmp_path / "out") == whole("soup 2")


def test_a_plain_folder_takes_the_place_of_what_was_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", fault=KeyboardInterrupt(), after=2)
    with new_folder(tmp_path / "out"):
        pass
    assert read_below(tmp_path / "out") == {}
    assert left_in(tmp_path) == ["out"]


def test_a_full_disk_keeps_what_is_finished_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no space is left") as caught:
        run(tmp_path / "out", fault=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), after=3)
    assert "resumes with the finished pieces" in caught.value.mend
    assert run(tmp_path / "out") == [PIECES[3]]


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    run(tmp_path / "out", identity="old")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", fault=KeyboardInterrupt(), after=3, overwrite=True)
    assert read_below(tmp_path / "out") == whole("old")
    with pytest.raises(OutputExistsError, match="exists already"):
        run(tmp_path / "out")
    assert run(tmp_path / "out", overwrite=True) == [PIECES[3]]  # the refusal has not cost the work
    assert read_below(tmp_path / "out") == whole()
    assert left_in(tmp_path) == ["out"]


def test_a_target_that_appears_meanwhile_does_not_cost_the_work(tmp_path: Path) -> None:
    work = resumable_folder(tmp_path / "out", "soup 1")
    yielded = work.__enter__()
    write_piece(yielded.folder, PIECES[0], f"soup 1: {PIECES[0]}")
    yielded.mark(PIECES[0])
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError):
        work.__exit__(None, None, None)
    (tmp_path / "out").rmdir()
    assert run(tmp_path / "out") == list(PIECES[1:])
    assert read_below(tmp_path / "out") == whole()


def torn(journal: bytes) -> Iterable[tuple[bytes, int]]:
    """Yield truncated or damaged journals, and the number of the two pieces that they still list."""
    first, one, two = journal.splitlines(keepends=True)
    for length in range(len(first)):
        yield journal[:length], 0
    yield from ((first + one[:length], 0) for length in range(len(one)))
    yield from ((first + one + two[:length], 1) for length in range(len(two)))
    yield first + one + b"\0" * 50, 1
    yield first + one + two[:-3] + b'"four.bin"\n', 1
    yield first + b"7\n" + two, 0
    yield first + b'"../../etc"\n', 0
    yield journal.replace(b"soup 1", b"soup 2"), 0
    yield b"", 0
    yield journal, 2


def test_a_torn_journal_costs_the_pieces_that_it_does_not_tell(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", fault=KeyboardInterrupt(), after=2)
    place = tmp_path / ".out.partial"
    journal = (place / "journal").read_bytes()
    for number, (text, kept) in enumerate(torn(journal)):
        place.mkdir(exist_ok=True)
        for name in PIECES[:2]:
            write_piece(place / "new", name, f"soup 1: {name}")
        (place / "journal").write_bytes(text)
        # the journal must go on soundly behind what was torn: it is cut once more, and read again
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", fault=KeyboardInterrupt(), after=1)
        assert run(tmp_path / "out") == list(PIECES[kept + 1 :]), text
        assert read_below(tmp_path / "out") == whole(), text
        (tmp_path / "out").rename(tmp_path / f"done-{number}")


def test_a_piece_that_is_gone_is_written_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", fault=KeyboardInterrupt(), after=3)
    (tmp_path / ".out.partial" / "new" / PIECES[0]).unlink()
    assert run(tmp_path / "out") == [PIECES[0], PIECES[3]]


def test_after_a_new_start_of_the_machine_only_durable_pieces_are_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot = tmp_path / "boot_id"
    monkeypatch.setattr(journal_module, "_BOOT_ID", boot)
    for durable, expected in ((False, list(PIECES)), (True, list(PIECES[2:]))):
        boot.write_text("before\n")
        target = tmp_path / f"out {durable}"
        with pytest.raises(KeyboardInterrupt):
            run(target, fault=KeyboardInterrupt(), after=2, durable=durable)
        boot.write_text("after\n")
        assert run(target, durable=durable) == expected


def test_where_the_start_of_the_machine_is_unknown_nothing_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_BOOT_ID", tmp_path / "nowhere")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", fault=KeyboardInterrupt(), after=2)
    assert run(tmp_path / "out") == list(PIECES)


def test_durable_pieces_are_on_the_disk_before_their_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").resolve().name))
    with resumable_folder(tmp_path / "out", "x", durable=True) as work:
        write_piece(work.folder, "users/three", "x")
        synced.clear()
        work.mark("users/three")
        assert synced == ["within.bin", "three", "users", "new", "journal"]


def test_without_locks_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", fault=KeyboardInterrupt(), after=2)
    assert left_in(tmp_path) == []
    assert run(tmp_path / "out") == list(PIECES)


@pytest.mark.parametrize("name", ["", "nowhere", "../out", "/etc/passwd", "a/../one.bin", "."])
def test_only_what_is_there_can_be_marked(tmp_path: Path, name: str) -> None:
    with resumable_folder(tmp_path / "out", "x") as work:
        (work.folder / "one.bin").write_text("1")
        with pytest.raises(ValueError, match="not the relative path of an existing file or folder in"):
            work.mark(name)
        work.mark("./one.bin")


def test_links_in_what_was_kept_lead_nowhere(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    write_piece(theirs, "two/a.bin", "theirs")
    write_piece(theirs, "x.bin", "theirs")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", fault=KeyboardInterrupt(), after=2)
    shutil.rmtree(tmp_path / ".out.partial" / "new" / "users")
    (tmp_path / ".out.partial" / "new" / "users").symlink_to(theirs)
    assert run(tmp_path / "out") == list(PIECES[1:])
    assert read_below(tmp_path / "out") == whole()
    assert read_below(theirs) == {"two/a.bin": "theirs", "x.bin": "theirs"}
