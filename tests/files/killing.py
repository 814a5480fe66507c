"""A program that runs writers of folders in processes of its own, kills them, and prints what the disk then holds.

It has one thread and no torch, so that it can fork; test_kills.py starts it and judges what it prints, a line a kill.
"""

# ruff: noqa: T201 # it prints for the test that started it

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from personalized_soups.errors import SoupError
from personalized_soups.files import swap
from personalized_soups.files.atomic import new_file, new_folder, resumable_folder

PIECES = ("one", "two/a", "two/b", "three", "four")


def write(folder: Path, name: str, what: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    for part in range(3):
        with path.open("a") as file:
            file.write(f"{what} {name} {part}\n")
        time.sleep(0.0002)


def write_all(folder: Path, what: str) -> None:
    for name in PIECES:
        write(folder, name, what)
    (folder / "soup.json").write_text(json.dumps({"files": [*PIECES, "soup.json"]}))


def make_plain(target: Path, what: str, *, overwrite: bool, notify: Callable[[str], None]) -> None:
    with new_folder(target, overwrite) as scratch:
        notify("working")
        write_all(scratch, what)


def make_resumable(target: Path, what: str, *, overwrite: bool, notify: Callable[[str], None]) -> None:
    with resumable_folder(target, what, overwrite) as work:
        notify("working")
        for name in PIECES:
            if name not in work.done:
                write(work.folder, name, what)
                notify(f"marking {name}")
                work.mark(name)
                notify(f"marked {name}")
        (work.folder / "soup.json").write_text(json.dumps({"files": [*PIECES, "soup.json"]}))


def make_file(target: Path, what: str, *, overwrite: bool, notify: Callable[[str], None]) -> None:
    with new_file(target) as scratch, scratch.open("w") as file:
        notify("working")
        for part in range(3):
            file.write(f"{what} {part}\n")
            file.flush()


MAKERS = {"plain": make_plain, "resumable": make_resumable, "file": make_file}


def state(target: Path) -> str:
    """Return `absent`, or what the folder is where it is whole, or its files where it is not."""
    if not os.path.lexists(target):
        return "absent"
    if target.is_file():
        text = target.read_text()
        whole = [what for what in ("old", "new") if text == "".join(f"{what} {part}\n" for part in range(3))]
        return whole[0] if whole else f"broken: {text}"
    held = {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()}
    for what in ("old", "new"):
        files = json.dumps({"files": [*PIECES, "soup.json"]})
        if held == {**{n: "".join(f"{what} {n} {i}\n" for i in range(3)) for n in PIECES}, "soup.json": files}:
            return what
    return f"broken: {held}"


def forked(work: Callable[[Callable[[str], None]], None]) -> tuple[int, int]:
    """Run `work` in a new process; return its id and the pipe for its reports."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    pipe = os.fdopen(writing, "w")
    code = 1
    try:
        work(lambda line: print(line, file=pipe, flush=True))
        code = 0
    except SoupError as error:
        print(f"refused: {error.what}", file=pipe, flush=True)
        code = 2
    finally:
        os._exit(code)


def ended(child: int, reading: int) -> tuple[int, list[str]]:
    with open(reading) as pipe:
        lines = pipe.read().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lines


def killed_at_event(number: int, work: Callable[[Callable[[str], None]], None]) -> tuple[int, list[str]]:
    """Run `work` and kill it just before its `number`-th call that reaches for the file system or the libc."""

    def counted(notify: Callable[[str], None]) -> None:
        left = number

        def hook(event: str, _: Any) -> None:
            nonlocal left
            if event.partition(".")[0] in {"open", "os", "shutil", "ctypes", "fcntl"}:
                left -= 1
                if left == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work(notify)

    return ended(*forked(counted))


def killed_after(seconds: float, work: Callable[[Callable[[str], None]], None]) -> tuple[int, list[str]]:
    child, reading = forked(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child, reading)


def report(kind: str, folder: Path, killed: Callable[..., tuple[int, list[str]]], moment: float, old: bool) -> bool:
    """Kill one run, run it again, and print what was found after each; return whether it was killed in time."""
    folder.mkdir()
    target = folder / "out"
    make = MAKERS[kind]
    if old:
        (make_file if kind == "file" else make_plain)(target, "old", overwrite=False, notify=lambda _: None)
    code, lines = killed(moment, lambda notify: make(target, "new", overwrite=old, notify=notify))
    found = {"moment": moment, "code": code, "lines": lines, "after_kill": state(target)}
    again: list[str] = []
    try:
        make(target, "new", overwrite=old, notify=again.append)
    except SoupError as error:
        again.append(f"refused: {error.what}")
    found |= {"again": again, "after_rerun": state(target), "left": sorted(os.listdir(folder))}  # noqa: PTH208
    print(json.dumps(found), flush=True)
    return code == -signal.SIGKILL


def race(folder: Path, num_runs: int) -> None:
    """Let several runs begin at once, and print how each ended."""
    folder.mkdir()
    target = folder / "out"
    start = time.monotonic() + 0.01

    def work(notify: Callable[[str], None]) -> None:
        while time.monotonic() < start:
            pass
        make_plain(target, "new", overwrite=False, notify=notify)

    runs = [ended(*each) for each in [forked(work) for _ in range(num_runs)]]
    found = {"runs": runs, "after": state(target), "left": sorted(os.listdir(folder))}  # noqa: PTH208
    print(json.dumps(found), flush=True)


def main(mode: str, kind: str, old: str, *, count: int, folder: Path) -> None:
    """Kill runs of a kind, over an old folder or over none, in one mode; `count` of them where it has no end itself."""
    if mode == "race":
        for number in range(count):
            race(folder / str(number), num_runs=5)
    elif mode == "events":
        number = 0
        while report(kind, folder / str(number), killed_at_event, number, old == "old"):
            number += 1
    else:
        dice = random.Random(0)
        begin = time.monotonic()
        ended(*forked(lambda notify: MAKERS[kind](folder / "whole", "new", overwrite=False, notify=notify)))
        usual = time.monotonic() - begin
        for number in range(count):
            report(kind, folder / str(number), killed_after, dice.uniform(0, 1.3 * usual), old == "old")


def locking_only_files(flock: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Return `flock` as NFS has it: a lock needs a descriptor that can write, which a folder has not."""

    def flock_of_nfs(descriptor: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, how)

    return flock_of_nfs


if __name__ == "__main__":
    if sys.argv[4] == "two renames":  # as on a system that cannot exchange two folders
        vars(swap)["exchange"] = lambda *_: False
    if sys.argv[4] == "file locks":
        vars(fcntl)["flock"] = locking_only_files(fcntl.flock)
    main(*sys.argv[1:4], count=int(sys.argv[5]), folder=Path(sys.argv[6]))
