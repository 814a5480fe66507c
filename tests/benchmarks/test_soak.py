"""The soak, shortened: full load, clients that hang up, profiles that change, and every answer compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import soak


@pytest.mark.slow
def test_a_short_soak_finds_nothing_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PSOUPS_BENCH_DIR", str(tmp_path))
    code = soak.main(["--seconds", "12", "--users", "24"])
    output = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0, output
    assert (output["wrong"], output["unexplained"], output["left"]) == ([], 0, 0.0)
    # A busy machine gives a fifth of what a quiet one does, so these bounds only say that every kind of work was done.
    assert output["answers"] > 10
    assert output["hung_up"] > 0
    assert output["updates"] > 10
    assert output["conflicts"] > 0
    # ten seconds are no ten minutes: a leak of a few megabytes a second would show all the same
    assert abs(output["memory_growth"]) < 0.05


def test_a_wrong_answer_or_a_lost_update_would_be_seen() -> None:
    """The soak's own eyes: an answer of somebody else's, and a version that is not there."""
    found = soak.Soak(0, 0, crowd=1, seconds=0)
    found._solo = {(0, 0): "mine", (1, 0): "another's"}
    found._written["u0"] = {7: 0}
    found._compare("u0", 7, 0, "mine")
    assert found.seen.parted == []
    found._compare("u0", 7, 0, "another's")
    assert found.seen.parted == [(0, 0, "another's")]
