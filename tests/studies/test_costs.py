"""What stages cost: seconds add up over interrupted runs, and memory is the sum over processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from personalized_soups.errors import RunError
from personalized_soups.studies import costs
from personalized_soups.studies.costs import Costs, largest_memory
from personalized_soups.studies.folder import StudyFolder


def test_seconds_add_up_over_runs_and_memory_is_the_largest_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 12.5, 100.0, 101.0, 0.0, 7.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(costs, "largest_memory", lambda of_children=False: 70 if of_children else 1000)
    first = Costs(StudyFolder(tmp_path))
    with first.stage("pairs"):
        first.saw(1, 20)
        first.saw(1, 50)
        first.saw(1, 40)  # a process never forgets its largest memory
        first.saw(2, 5)
    again = Costs(StudyFolder(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        interrupted(again)
    with again.stage("train"):
        again.saw_children(2)
    assert again.seconds == {"pairs": 3.5, "train": 7.0}
    assert again.memory == {"pairs": 1055, "train": 1140}  # 1000 + 50 + 5; 1000 + 2 * 70


def interrupted(again: Costs) -> None:
    with again.stage("pairs"):
        again.saw(3, 10)
        raise KeyboardInterrupt


def test_a_damaged_file_of_costs_is_named(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(RunError, match="not JSON") as caught:
        _ = Costs(StudyFolder(tmp_path)).memory
    assert caught.value.where == str(tmp_path / "memory.json")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not count the largest memory of a process")
def test_the_largest_memory_is_in_bytes() -> None:
    """A fresh process that fills 64 MiB has these and an interpreter, which takes far less than 256 MiB."""
    code = (
        "from personalized_soups.studies.costs import largest_memory\n"
        "before = largest_memory(); block = bytearray(b'x') * 2**26; print(largest_memory() - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.9 * 2**26 <= grown <= 2**28
    assert largest_memory(of_children=True) > 2**26
    assert json.dumps(largest_memory()).isdigit()
