from __future__ import annotations

import json

import pytest

from personalized_soups.cli import render


def test_a_table_is_data_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_table(["expert", "weight"], [["friendly", 0.123456], ["[bold]", None]], title="weights")
    printed = capsys.readouterr()
    assert printed.err == ""
    for cell in ("weights", "expert", "friendly", "0.1235", "[bold]", "-"):
        assert cell in printed.out


def test_a_table_as_json_is_a_list_of_objects(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_table(["expert", "weight"], [["ü", 0.123456]], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"expert": "ü", "weight": 0.123456}]


def test_a_record_shows_lists_and_mappings(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"rank": 8, "modules": ["q", "k"], "exact": True, "weights": {"a": 0.5}}
    render.show_record(record)
    out = capsys.readouterr().out
    for cell in ("rank", "8", "q, k", "yes", "a: 0.5"):
        assert cell in out
    render.show_record(record, as_json=True)
    assert json.loads(capsys.readouterr().out) == record


def test_json_rejects_nan_and_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        render.show_json({"loss": float("nan")})
    assert capsys.readouterr().out == ""


def test_pieces_of_an_answer_are_joined(capsys: pytest.CaptureFixture[str]) -> None:
    render.show_text("Wash ", end="")
    render.show_text("it.")
    assert capsys.readouterr().out == "Wash it.\n"


def test_progress_without_a_terminal_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with render.progress("training friendly", 4) as bar:
        for step in range(1, 5):
            bar.update(step, loss=0.5 / step)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("training friendly: 4/4  loss 0.125 (")


def test_long_work_without_a_terminal_prints_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "_LOG_SECONDS", 0.0)
    with render.progress("sampling", 3) as bar:
        bar.update(1)
        bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines[:2]] == ["sampling: 1/3", "sampling: 2/3"]
    assert "s left" in lines[0]


def test_a_quiet_bar_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with render.progress("x", 2, quiet=True) as bar:
        bar.update(2, loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_shows_figures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with render.progress("training [x]", None) as bar:
        bar.update(3, total=3, loss=0.25)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "training [x]" in printed.err
    assert "loss 0.25" in printed.err


def test_work_of_an_earlier_run_does_not_count_for_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "_LOG_SECONDS", 0.0)
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with render.progress("training", 100, done=90) as bar:
        bar.update(95)  # five in ten seconds, five to go
    assert "95/100, 10 s left" in capsys.readouterr().err


def test_the_time_before_the_first_update_does_not_count_for_the_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "_LOG_SECONDS", 0.0)
    clock = iter([0.0, 300.0, 310.0, 330.0])  # five minutes until the first step, and then ten seconds a step
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with render.progress("training", 10) as bar:
        bar.update(1)
        bar.update(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training: 1/10, 2700 s left")
    assert lines[1].startswith("training: 2/10, 80 s left")
