"""Processes are measured from start to end, with their children's memory; failures are distinguished."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.measure import (
    MissingError,
    Run,
    Way,
    WayError,
    anonymous_bytes,
    family,
    measure,
    run_process,
)

_HOLD = "held = bytearray(b'x' * {mib} * 2**20); import time; time.sleep(1.0)"


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_memory_of_a_process_and_its_child_is_added_up() -> None:
    child = _HOLD.format(mib=64)
    code = f"import subprocess, sys\nother = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    run = run_process(_python(code + _HOLD.format(mib=96) + "\nother.wait()"))
    # Python itself takes some 10 MB in each of both; the literal is made twice for a moment at most
    assert 160 << 20 < run.anon_bytes < 2 * (160 << 20) + (40 << 20)
    assert run.process_s > 1.0


def test_pages_of_a_mapped_file_are_not_counted(tmp_path: Path) -> None:
    file = tmp_path / "mapped"
    file.write_bytes(b"x" * (128 << 20))
    code = (
        "import mmap, time\n"
        f"stream = open({str(file)!r}, 'rb')\n"
        "view = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)\n"
        "sum(view[place] for place in range(0, len(view), 4096))\n"
        "time.sleep(0.1)"
    )
    assert run_process(_python(code)).anon_bytes < 64 << 20


def test_a_process_that_ended_has_neither_children_nor_memory() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert family(child.pid) == [child.pid]
    assert anonymous_bytes(child.pid) == 0


def test_the_last_line_is_the_report() -> None:
    assert run_process(_python("print('talk'); print('{\"seconds\": 0.25}')")).seconds == 0.25
    assert run_process(_python("print('no object')")).report == {}


def test_a_way_that_fails_says_why_and_what_is_missing_is_no_failure() -> None:
    with pytest.raises(WayError, match=r"exit 1: .*ZeroDivisionError"):
        run_process(_python("1 / 0"))
    with pytest.raises(MissingError, match="no GPU here"):
        run_process(_python('print(\'{"missing": "no GPU here"}\')'))
    with pytest.raises(WayError, match="No such command"):
        run_process([sys.executable, "-m", "personalized_soups", "merge-nothing"])


def test_ways_take_turns_and_a_failing_one_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def process(command: Sequence[str]) -> Run:
        name, out = command
        asked.append(name)
        assert not Path(out).exists()
        assert Path(out).parent.is_dir()
        Path(out).write_text(name, encoding="utf-8")
        if name == "broken":
            raise WayError("it broke")
        return Run(1.0, 0)

    monkeypatch.setattr("benchmarks.measure.run_process", process)
    seen = []
    ways = [
        Way("one", lambda out: ["one", str(out)]),
        Way("broken", lambda out: ["broken", str(out)]),
        Way("long", lambda out: ["long", str(out)], most=1),
    ]
    runs = measure(ways, 3, tmp_path / "outputs", after=lambda way, out: seen.append((way, out.read_text())))
    assert asked == ["one", "broken", "long", "one", "one"]
    assert seen == [("one", "one"), ("long", "long")]
    assert isinstance(runs["broken"], WayError)
    assert [len(runs[name]) for name in ("one", "long")] == [3, 1]  # type: ignore[arg-type]
    assert not (tmp_path / "outputs").exists()
