"""JSON Lines files that grow, and go on where a run was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.errors import OutputExistsError, UsageError
from personalized_soups.files.lines import growing_lines, is_whole, read_lines
from personalized_soups.files.workplace import claimed

SETTINGS = {"seed": 0, "base": "tiny"}


class _KilledError(Exception):
    pass


def _interrupted(path: Path, rows: int, rest: bytes = b"") -> None:
    """Write some rows and a piece of another, as a run that is killed then leaves them."""

    def run() -> None:
        with growing_lines(path, SETTINGS) as lines:
            lines.add([{"row": row} for row in range(rows)])
            with path.open("ab") as file:
                file.write(rest)
            raise _KilledError

    with pytest.raises(_KilledError):
        run()


def test_a_whole_file_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    with growing_lines(path, SETTINGS) as lines:
        assert lines.num_done == 0
        lines.add([{"answer": "ü"}])
        lines.add([])
        lines.add([{"answer": "b"}, {"answer": "c"}])
    assert [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()] == ["ü", "b", "c"]
    assert [each.name for each in path.parent.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("rest", [b"", b'{"row": 3', b'{"row": "' + b"x" * (3 << 20)])
def test_it_goes_on_after_the_last_whole_line(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    _interrupted(path, 3, rest)
    with growing_lines(path, SETTINGS) as lines:
        assert lines.num_done == 3
        lines.add([{"row": 3}])
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_lines_longer_than_a_block_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    _interrupted(path, 3, b"x" * (5 << 19) + b"\n" + b"y" * (5 << 19))
    with growing_lines(path, SETTINGS) as lines:
        assert lines.num_done == 4


def test_other_settings_do_not_go_on_with_it(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    _interrupted(path, 2)
    with pytest.raises(UsageError, match="these settings differ: seed"), growing_lines(path, {**SETTINGS, "seed": 1}):
        pass
    assert len(path.read_text().splitlines()) == 2
    with growing_lines(path, {**SETTINGS, "seed": 1}, overwrite=True) as lines:
        assert lines.num_done == 0
    assert path.read_bytes() == b""


def test_a_whole_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("mine\n")
    with pytest.raises(OutputExistsError, match="exists already"), growing_lines(path, SETTINGS):
        pass
    assert path.read_text() == "mine\n"
    with pytest.raises(OutputExistsError, match="a folder"), growing_lines(tmp_path, SETTINGS):
        pass
    with growing_lines(path, SETTINGS, overwrite=True) as lines:
        lines.add([{"row": 0}])
    assert path.read_text() == '{"row": 0}\n'


def test_a_run_that_fails_before_its_first_line_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"

    def fail(overwrite: bool = False) -> None:
        with growing_lines(path, SETTINGS, overwrite=overwrite):
            raise _KilledError

    with pytest.raises(_KilledError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with growing_lines(path, {**SETTINGS, "base": "right"}) as lines:  # other settings: the first ones were a mistake
        lines.add([{"row": 0}])
    with pytest.raises(_KilledError):
        fail(overwrite=True)
    assert read_lines(path) == [{"row": 0}]


def test_a_run_that_was_killed_while_it_began_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    _interrupted(path, 0)
    assert path.read_bytes() == b""
    with growing_lines(path, {**SETTINGS, "seed": 3}) as lines:
        lines.add([{"row": 0}])
    path.unlink()
    _interrupted(path, 2)
    path.unlink()  # between taking away the old file and making the new one
    with growing_lines(path, {**SETTINGS, "seed": 4}) as lines:
        assert lines.num_done == 0


def test_texts_may_hold_what_others_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "a\r\nb", "a\x1cb"]
    with growing_lines(path, SETTINGS) as lines:
        lines.add([{"text": text} for text in texts])
    assert [row["text"] for row in read_lines(path)] == texts


def test_a_run_that_ends_while_another_begins_keeps_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.jsonl"
    _interrupted(path, 1)
    place = "personalized_soups.files.lines.claimed"

    def ended_meanwhile(target: Path) -> Any:
        monkeypatch.setattr(place, claimed)
        with growing_lines(path, SETTINGS) as lines:
            lines.add([{"row": 1}])
        return claimed(target)

    monkeypatch.setattr(place, ended_meanwhile)
    with pytest.raises(OutputExistsError, match="exists already"), growing_lines(path, SETTINGS):
        pass
    assert read_lines(path) == [{"row": 0}, {"row": 1}]
    assert is_whole(path, 2)
    assert not is_whole(path, 3)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with growing_lines(path, SETTINGS) as lines:
        lines.add([{"row": 0}])
        with pytest.raises(OutputExistsError), growing_lines(path, SETTINGS):
            pass
    assert path.read_text() == '{"row": 0}\n'
