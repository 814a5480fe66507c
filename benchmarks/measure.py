"""Fresh processes, timed from their start to their end, with the anonymous memory that they and their children held."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Children are looked for less often than memory is read: finding them costs more, and those of consequence live longer.
_SAMPLE_SECONDS = 0.005
_CHILDREN_EVERY = 10

_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a way.

    Args:
        process_s: from the process' start to its end.
        anon_bytes: the most RssAnon that it and its children held at once; pages of mapped files are not in it.
        report: what it printed as its last line, where that is a JSON object; `seconds` is the span without imports.
    """

    process_s: float
    anon_bytes: int
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The span without imports, as the way itself measured it."""
        return float(self.report["seconds"])


class WayError(Exception):
    """A way failed; its last words say why."""


class MissingError(Exception):
    """This machine lacks something that a way needs."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way of doing the work.

    Args:
        name: by which its figures are found.
        command: makes the command; its argument is an output folder that is not there yet.
        reads: files or folders that are brought into the page cache before each run.
        most: repeat at most so often, where one run takes minutes.
    """

    name: str
    command: Callable[[Path], Sequence[str]]
    reads: Sequence[Path] = ()
    most: int | None = None


def script(name: str, **arguments: object) -> list[str]:
    """Return the command that runs `benchmarks/ways/NAME.py` with one JSON object as its argument."""
    return [sys.executable, "-m", f"benchmarks.ways.{name}", json.dumps(arguments, default=str)]


def measure(
    ways: Sequence[Way],
    repeats: int,
    outputs: Path,
    *,
    after: Callable[[str, Path], None] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Run] | Exception]:
    """Run every way `repeats` times, in turns, so that a load that comes and goes hits all of them alike.

    A way that fails is not run again; its error takes the place of its figures. Outputs are deleted after each run.

    Args:
        ways: what to run.
        repeats: how often each is run.
        outputs: a folder for the outputs.
        after: called with the way's name and its output after its first run, before that is deleted.
        progress: called with the way's name before each run.
    """
    results: dict[str, list[Run] | Exception] = {way.name: [] for way in ways}
    for turn in range(repeats):
        for way in ways:
            runs = results[way.name]
            if isinstance(runs, Exception) or (way.most is not None and turn >= way.most):
                continue
            progress(way.name)
            try:
                runs.append(_measured(way, outputs, after if turn == 0 else None))
            except (WayError, MissingError) as error:
                results[way.name] = error
    return results


def run_process(command: Sequence[str]) -> Run:
    """Run a command to its end.

    Raises:
        MissingError: if its last line is a JSON object with `missing`.
        WayError: if it fails.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as talk:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=talk, cwd=ROOT, env=environment
        )
        memory = _Memory(process.pid)
        with memory:
            try:
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            seconds = time.perf_counter() - start
        report = _last_object(_read(output))
        if missing := report.get("missing"):
            raise MissingError(missing)
        if code != 0:
            words = " | ".join(line for line in _read(talk).splitlines()[-5:] if line.strip())
            raise WayError(f"exit {code}: {words[-400:]}")
    return Run(seconds, memory.peak, report)


def median(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def remove(path: Path) -> None:
    """Delete an output, of any kind, in another process: deletion is not part of the measured work."""
    subprocess.run(["rm", "-rf", str(path)], check=True)


def _measured(way: Way, outputs: Path, after: Callable[[str, Path], None] | None) -> Run:
    remove(outputs)
    outputs.mkdir(parents=True)
    out = outputs / "out"
    os.sync()  # what earlier runs left to be written is no part of this one
    for path in way.reads:
        _warm(path)
    try:
        run = run_process(way.command(out))
        if after is not None:
            after(way.name, out)
        return run
    finally:
        remove(outputs)


def _warm(path: Path) -> None:
    """Read a file or all files below a folder, so that the page cache contains them."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(_READ_BYTES):
                    pass


class _Memory(threading.Thread):
    """Samples RssAnon of a process and of its descendants until it is left; `peak` is the largest sum."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid = pid
        self._done = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        """Sample until `stop` is called."""
        pids = [self._pid]
        count = 0
        while not self._done.wait(_SAMPLE_SECONDS):
            if count % _CHILDREN_EVERY == 0:
                pids = family(self._pid)
            count += 1
            self.peak = max(self.peak, sum(map(anonymous_bytes, pids)))


def family(pid: int) -> list[int]:
    """Return a process and all of its descendants that there are; whoever ends meanwhile is left out."""
    found = [pid]
    for parent in found:  # grows while it is walked
        with suppress(OSError):  # ended meanwhile: before its threads were listed, or after
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += _children(thread / "children")
    return found


def _children(file: Path) -> list[int]:
    try:
        return [int(child) for child in file.read_text(encoding="ascii").split()]
    except OSError:  # that thread alone ended
        return []


def anonymous_bytes(pid: int) -> int:
    """Return RssAnon of a process; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0  # a process that has ended but is not waited for has no memory


def _last_object(text: str) -> dict[str, Any]:
    lines = text.strip().splitlines()
    try:
        value = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _read(stream: Any) -> str:
    stream.seek(0)
    return str(stream.read().decode(errors="replace"))
