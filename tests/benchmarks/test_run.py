"""The benchmark's table has every row; its arithmetic is right; a small run of real processes gives sane figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import mergekit, run
from benchmarks.experiments import experiment as experiments_module
from benchmarks.experiments.every import experiments
from benchmarks.measure import MissingError, Run, WayError
from benchmarks.shapes import SCALES

ROOT = Path(__file__).resolve().parent.parent.parent

# What must be reached, row by row: the figure of the bar.
BARS = {
    "adapter-span": ("at least", 8),
    "adapter-process": ("at least", 2.5),
    "adapter-agreement": ("at most", 1e-6),
    "adapter-memory": ("below", 500),
    "truncated-span": ("at least", 100),
    "truncated-agreement": ("at most", 1e-5),
    "base-process": ("at least", 4),
    "base-mergekit": ("at least", 12),
    "base-span": ("at most", 3.5),
    "base-memory": ("below", 700),
    "base-agreement": ("at most", 1),
    "base-memory-deep": ("below", 700),
    "many-further": ("at most", 1.5),
    "many-agreement": ("at most", 1e-6),
    "many-arithmetic": ("at least", 0.75),
    "many-gpu-arithmetic": ("at least", 0.5),
    "live-free-gpu": ("at least", 0.9),
    "live-shared-gpu": ("at least", 0.9),
    "mixing-embedded": ("at least", 3),
    "mixing-agreement": ("at most", 1e-5),
    "mixing-greedy": ("at most", 0),
    "mixing-peft": ("at least", 1.4),
    "mixing-base": ("at least", 0.85),
    "mixing-change": ("below", 1),
    "mixing-user": ("below", 1000),
    "mixing-shared": ("at least", 0.9),
    "mixing-wrap": ("at least", 5),
    "mixing-gpu": ("at least", 0.9),
    "tuning-answers": ("at least", 5),
    "serving-rate": ("at least", 5),
    "serving-parted": ("at most", 0),
    "serving-first": ("at most", 1.5),
    "serving-first-95": ("below", 500),
    "serving-alone": ("at most", 1.25),
    "playground-paint": ("below", 1000),
    "playground-bytes": ("below", 100_000),
    "profiles-import": ("below", 60),
    "profiles-lookup": ("below", 1),
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Return a page with empty tables."""
    path = tmp_path / "page.md"
    blocks = "".join(f"<!-- {part}: begin -->\n<!-- {part}: end -->\nby hand\n" for part in ("cpu", "gpu", "serving"))
    path.write_text(f"# Page\n{blocks}", encoding="utf-8")
    return path


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for the benchmark's files."""
    monkeypatch.setenv("PSOUPS_BENCH_DIR", str(tmp_path / "world"))
    return tmp_path / "world"


@pytest.mark.parametrize("shape", sorted(SCALES))
def test_every_bar_has_its_row(shape: str) -> None:
    rows = [row for each in experiments(SCALES[shape]) for row in each.rows]
    assert {row.name: (row.bar.kind, row.bar.value) for row in rows if row.bar is not None} == BARS
    assert len({row.name for row in rows}) == len(rows)


def test_figures_become_rows(
    world: Path, page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes are made up: ours take 1 s in all and half of it for the span, the others 12 s and 10 s."""
    asked = []

    def process(command: Sequence[str]) -> Run:
        name = command[2].removeprefix("benchmarks.ways.") if command[1:2] == ["-m"] else command[0]
        asked.append(name)
        if name == "ours_live":
            raise MissingError("no room here")
        if name in {"memory_copy", "ours_mixing", "bare_mixing"} and "cuda" in command[3]:
            raise MissingError("no GPU here")
        if "merge-many" in command:
            raise WayError("exit 1: it broke")
        ours = name.startswith("ours") or name == "personalized_soups"
        count = json.loads(command[3]).get("count", 0) if name == "ours_many" else 0
        report = {"seconds": 0.5 + count / 8 if ours else 10.0, "layers": 16, "error": 1e-7}
        report |= {"tokens_per_second": 96.0 if ours else 24.0, "change_seconds": 3e-4, "user_bytes": 600.0}
        report |= {"parted": 1, "unexplained": 0}
        report |= {"import_seconds": 24.0, "plain_import_seconds": 8.0}
        report |= {"alone_tokens_per_second": 16.0, "first_median": 0.02, "first_95": 0.03, "first": 0.04}
        report |= {"alone_seconds_per_token": 0.001, "per_token": 0.002, "paint": 0.3, "num_bytes": 60_000}
        report |= {"lookup_seconds": 1e-4, "plain_lookup_seconds": 2e-5}
        report |= {"answers": 2.0, "answers_few": 18.0, "answers_whole": 12.0}
        report |= {"likelihood": 0.5, "likelihood_few": 1.0, "likelihood_whole": 0.8}
        return Run(1.0 if ours else 12.0, 300_000_000, {**report, "bytes_per_second": 4e9})

    def install(environment: Path) -> None:
        raise MissingError("mergekit cannot be installed: no network")

    for module in ("benchmarks.measure", "benchmarks.experiments.experiment", "benchmarks.machine"):
        monkeypatch.setattr(f"{module}.run_process", process)
    monkeypatch.setattr(mergekit, "install", install)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code = run.main(["--shape", "tiny", "--repeats", "3", "--page", str(page)])
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    rows = {row["name"]: row for row in result["rows"]}
    expected = [row.name for each in experiments(SCALES["tiny"]) for row in each.rows]

    assert code == 1  # merge-many broke
    assert list(rows) == expected
    assert asked.count("ours_adapter") == 6  # three runs of each of two experiments
    assert asked.count("peft_svd") == 1  # minutes each
    assert rows["adapter-span"]["ratio"] == pytest.approx(20)
    assert rows["adapter-process"]["ratio"] == pytest.approx(12)
    assert rows["truncated-span"]["ratio"] == pytest.approx(16 * 20)
    assert rows["base-span"]["ratio"] == pytest.approx(0.5 / 12)
    assert rows["base-memory"]["ours"] == 300
    # 16 users more take 16 / 8 s more; 16 files are written in 10 s
    assert rows["many-further"]["ours"] == pytest.approx(1 / 8)
    assert rows["many-further"]["ratio"] == pytest.approx((1 / 8) / (10 / 16))
    assert rows["many-arithmetic"]["ratio"] == pytest.approx(1)
    assert rows["mixing-peft"]["ratio"] == pytest.approx(4)
    assert rows["mixing-wrap"]["ratio"] == pytest.approx(20)
    assert (rows["tuning-answers"]["ours"], rows["tuning-answers"]["ratio"]) == (2.0, 9.0)
    # rows without a bar say how many times more we take
    assert rows["tuning-likelihood-whole"]["ratio"] == pytest.approx(0.5 / 0.8)
    assert rows["mixing-change"]["ours"] == pytest.approx(0.3)
    assert (rows["profiles-import"]["ours"], rows["profiles-import"]["ratio"]) == (24.0, 3.0)
    assert rows["profiles-lookup"]["ours"] == pytest.approx(0.1)
    assert rows["serving-rate"]["ratio"] == pytest.approx(24 / 16)
    assert rows["serving-first"]["ratio"] == pytest.approx(0.5)
    assert rows["serving-alone"]["ratio"] == pytest.approx(0.5)
    unmeasured = {"base-mergekit", "many-gpu-arithmetic", "live-free-gpu", "live-shared-gpu", "mixing-gpu"}
    assert {name: row["met"] for name, row in rows.items() if row["bar"]} == {
        name: None if name in unmeasured else name != "serving-rate" for name in BARS
    }
    notes = {name: row["note"] for name, row in rows.items() if row["note"]}
    assert notes["base-mergekit"] == "mergekit cannot be installed: no network"
    assert notes["live-free-cpu"] == "no room here"
    assert notes["live-free-gpu"] == "no GPU here"
    assert notes["many-process"] == "failed: exit 1: it broke"
    text = page.read_text(encoding="utf-8")
    assert [name for name in expected if f"| {name} " not in text] == []
    assert text.count("by hand") == 3
    assert "Not measured yet." in text
    assert [name for name in expected if name not in output] == []
    assert not (world / "outputs").exists()


def test_a_part_that_was_measured_in_part_leaves_the_page_alone(page: Path) -> None:
    from benchmarks import page as pages

    before = page.read_text(encoding="utf-8")
    row = experiments(SCALES["tiny"])[0].rows[0].as_json()
    result: dict[str, Any] = {"shape": "tiny", "repeats": 1, "machine": {}, "load": [0, 0], "seconds": 0}
    assert pages.update(page, {**result, "rows": [row]}) == []
    assert page.read_text(encoding="utf-8") == before


@pytest.mark.slow
def test_real_processes_give_sane_figures(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run.main(["--shape", "tiny", "--repeats", "1", "--only", "adapter-span", "--json"])
    output = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(output)["rows"]}
    assert code == 0
    assert set(rows) == {"adapter-span", "adapter-process", "adapter-agreement"}
    for row in rows.values():
        assert math.isfinite(row["ours"])
        assert row["ours"] > 0
        assert row["note"] == ""
    assert 0.001 < rows["adapter-span"]["ours"] < rows["adapter-process"]["ours"] < 60
    assert rows["adapter-span"]["theirs"] < rows["adapter-process"]["theirs"]
    # the experts' values are float32: a sum of three rounds to a few times 2^-24
    assert rows["adapter-agreement"]["ours"] < 4 * 2**-24
    assert not (world / "outputs").exists()


def test_an_unknown_row_is_told_with_those_that_are_there() -> None:
    with pytest.raises(SystemExit, match="no row is called adaptor") as output:
        run.main(["--only", "adaptor"])
    assert "adapter-span" in str(output.value)


def test_the_page_of_the_repository_has_a_place_for_both_tables() -> None:
    text = (ROOT / "docs" / "explanation" / "benchmarks.md").read_text(encoding="utf-8")
    for part in ("cpu", "gpu"):
        assert text.index(f"<!-- {part}: begin -->\n") < text.index(f"<!-- {part}: end -->")


def test_the_ratio_is_read_as_its_bar_asks() -> None:
    filled = experiments_module.filled
    rows = {row.name: row for each in experiments(SCALES["tiny"]) for row in each.rows}
    faster = filled(rows["adapter-span"], [1.0, 2.0, 9.0], [16.0])
    assert (faster.ours, faster.theirs, faster.ratio, faster.is_met) == (2.0, 16.0, 8.0, True)
    assert faster.spread == ((1.0, 9.0), (16.0, 16.0))
    assert filled(rows["adapter-span"], [2.0], [15.9]).is_met is False
    slower = filled(rows["base-span"], [7.2], [2.0])
    assert (slower.ratio, slower.is_met) == (3.6, False)
    rate = filled(rows["many-arithmetic"], [3.0], [4.0])
    assert (rate.ratio, rate.is_met) == (0.75, True)
    # memory has a bar of its own, regardless of what the other way takes
    memory = filled(rows["base-memory"], [699.0], [2600.0])
    assert memory.is_met is True
    assert filled(rows["base-memory"], [700.0], [2600.0]).is_met is False
    assert filled(rows["base-memory"], [math.nan]).is_met is False
