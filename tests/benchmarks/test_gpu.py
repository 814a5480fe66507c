"""`make gpu`: every GPU row and every folder of GPU tests has a stage; one that hangs or fails costs its own result."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from benchmarks.experiments.every import experiments
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import plan, report, stages
from benchmarks.gpu.stages import Outcome, Stage
from benchmarks.shapes import SCALES

SCALE = SCALES["tiny"]
GPU_ROWS = [row.name for each in experiments(SCALE) for row in each.rows if row.part == "gpu"]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    blocks = "".join(f"<!-- {part}: begin -->\n<!-- {part}: end -->\n" for part in ("cpu", "gpu", "serving"))
    path.write_text(blocks, encoding="utf-8")
    return path


@pytest.mark.parametrize("shape", sorted(SCALES))
def test_every_row_has_a_stage_and_all_stages_end_within_six_minutes(shape: str) -> None:
    planned = plan.stages(SCALES[shape], shape)
    assert sorted(row for stage in planned for row in stage.rows) == sorted(GPU_ROWS)
    assert len({stage.name for stage in planned}) == len(planned)
    assert sum(stage.seconds for stage in planned) <= plan.TOTAL_SECONDS < 360
    assert {"card", "inputs", *plan.gpu_tests()} - {plan.KERNELS} <= {stage.name for stage in planned}


def test_folders_of_gpu_tests_are_found_wherever_the_mark_is(tmp_path: Path) -> None:
    mark = "pytest.mark" + ".gpu"  # in two parts: this file has no test for a GPU
    files = {
        "deep/below/test_a.py": f"@{mark}\ndef test_it(): ...",
        "shared/conftest.py": f'@pytest.fixture(params=[pytest.param("cuda", marks={mark})])\ndef device(): ...',
        "plain/test_b.py": "def test_gpu(): ...  # mark.gpus",
        "test_alone.py": f"pytestmark = {mark}",
    }
    for name, text in files.items():
        (tmp_path / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tests" / name).write_text(text)
    assert plan.gpu_tests(tmp_path / "tests") == ["tests/deep", "tests/shared", "tests/test_alone.py"]


def test_without_a_gpu_it_says_so_and_returns_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(report, "main", lambda: pytest.fail("it runs"))
    assert command.main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    what, where, mend = printed.err.splitlines()
    assert what.startswith("error: PyTorch ")
    assert what.endswith(" finds no CUDA device")
    assert where.startswith("   at: ")
    assert mend.startswith(" mend: run `make gpu` on a machine with an NVIDIA GPU")
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    assert command.main() == 2
    assert capsys.readouterr().err.startswith("error: PyTorch is not installed\n   at: ")


def test_a_stage_passes_or_fails_by_its_exit_code_and_reports_its_last_line() -> None:
    passed = stages.run_stage(_python('print("words"); print(\'{"rows": [1]}\')'), 60)
    assert (passed.state, passed.report, passed.output) == ("passed", {"rows": [1]}, ["words"])
    failed = stages.run_stage(_python('print("{}"); raise RuntimeError("it broke")'), 60)
    assert (failed.state, failed.reason) == ("failed", "RuntimeError: it broke")


def test_a_stage_is_ended_at_its_limit() -> None:
    outcome = stages.run_stage(_python("import time; time.sleep(600)"), 0.2)
    assert (outcome.state, outcome.reason) == ("timed out", "no result within 0 s")
    assert outcome.seconds < 20


def test_at_the_limit_the_processes_that_a_stage_started_end_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit comes once the stage has started its child, however slow the machine."""
    note = tmp_path / "pid"
    code = f"""
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
new = pathlib.Path({str(note)!r} + ".new")
new.write_text(str(child.pid))
new.rename({str(note)!r})
child.wait()
"""
    real_wait = subprocess.Popen.wait

    def wait(process: Any, timeout: float | None = None) -> int:
        if timeout is None:
            return real_wait(process)
        while not note.exists():
            assert process.poll() is None
            time.sleep(0.01)
        raise subprocess.TimeoutExpired("stage", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    assert stages.run_stage(_python(code), 1).state == "timed out"
    end = time.monotonic() + 30
    while _is_running(int(note.read_text())):
        assert time.monotonic() < end, "the child still runs"
        time.sleep(0.01)


def test_a_stage_of_tests_counts_them_and_names_what_was_skipped(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): ...\n"
        "def test_bad(): assert False\n"
        "def test_left_out(): pytest.skip('fastapi is not installed')\n"
    )
    outcome = stages.run_stage(Stage("some", (*plan.PYTEST, "-c", "/dev/null", str(file)), 60), 60)
    assert outcome.state == "failed"
    assert outcome.counts == {"failed": 1, "passed": 1, "skipped": 1}
    assert [line.partition(": ")[2] for line in outcome.skipped] == ["fastapi is not installed"]


def test_what_a_stage_leaves_over_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def run_stage(stage: Stage, limit: float) -> Outcome:
        limits.append(limit)
        return Outcome(
            stage.name, "passed", seconds={"quick": 4.0, "hangs": limit + 0.5, "last": 1.0}[stage.name], limit=limit
        )

    monkeypatch.setattr(stages, "run_stage", run_stage)
    stages.run_stages([Stage("quick", (), 10), Stage("hangs", (), 20), Stage("last", (), 30)])
    assert limits == [10, 26, 30]


def test_a_row_without_a_result_says_why_and_the_others_are_written(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row.name: row for each in experiments(SCALE) for row in each.rows}

    def run_stage(stage: Stage, limit: float) -> Outcome:
        good = Outcome(stage.name, "passed", 1.0, limit)
        if stage.name == "card":
            return replace(good, report={"processor": "some", "gpu": "NVIDIA Test, 1 GiB"})
        if stage.name == "mixing-gpu":
            return replace(good, state="timed out", seconds=limit, limit=85.0)
        if stage.name == "live-free-gpu":
            return replace(good, state="failed", output=["Traceback", "OSError: no such file", ""])
        if stage.name == "tests/merging":
            return replace(good, skipped=["tests/merging/test_x.py:1: hypothesis is not installed"])
        found = [replace(rows[name], ours=9.0, theirs=10.0, ratio=0.9).as_json() for name in stage.rows]
        return replace(good, report={"rows": found} if found else {})

    monkeypatch.setattr(stages, "run_stage", run_stage)
    code = report.main(["--shape", "tiny", "--page", str(page)])
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert code == 1
    assert [row["name"] for row in result["rows"]] == GPU_ROWS
    notes = {row["name"]: row["note"] for row in result["rows"] if row["note"]}
    assert notes == {
        "live-free-gpu": "failed: OSError: no such file",
        "mixing-gpu": "failed: no result within 85 s",
    }
    states = {stage["name"]: stage["state"] for stage in result["stages"]}
    assert {name for name, state in states.items() if state != "passed"} == {"live-free-gpu", "mixing-gpu"}
    text = page.read_text(encoding="utf-8")
    assert "- gpu: NVIDIA Test, 1 GiB" in text
    assert "- mixing-gpu: failed: no result within 85 s" in text
    assert text.count("| 9 GB/s ") == 2  # LiveAdapter's other kind, and merge_many's arithmetic
    assert "GPU: NVIDIA Test, 1 GiB" in printed.err
    assert "these packages are not installed: hypothesis" in printed.err


def test_a_run_of_some_stages_is_possible_and_all_good_ones_return_0(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run_stage(stage: Stage, limit: float) -> Outcome:
        ran.append(stage.name)
        return Outcome(stage.name, "passed", 1.0, limit)

    monkeypatch.setattr(stages, "run_stage", run_stage)
    before = page.read_text(encoding="utf-8")
    assert report.main(["--shape", "tiny", "--only", "tests/merging", "--page", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == before  # it may have figures of the other rows
    assert ran == ["card", "tests/merging"]
    assert {row["note"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]} == {"not run"}
    monkeypatch.setattr(stages, "run_stage", lambda stage, limit: Outcome(stage.name, "failed", 1.0, limit))
    assert report.main(["--shape", "tiny", "--only", "tests/merging"]) == 1  # though no row failed
    with pytest.raises(SystemExit, match="no stage is called nothing"):
        report.main(["--only", "nothing", "--page", str(page)])


def test_the_inputs_are_written_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PSOUPS_BENCH_DIR", str(tmp_path))
    assert run.main(["--shape", "tiny", "--only", "gpu", "--prepare"]) == 0
    assert capsys.readouterr().out == ""  # no table
    written = {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("settings.json")}
    assert written == {"worlds/tiny/base", "worlds/tiny/free", "worlds/tiny/shared"}


def _python(code: str) -> Stage:
    return Stage("python", ("-c", code), 60)


def _is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
