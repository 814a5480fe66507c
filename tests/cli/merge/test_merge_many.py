from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from personalized_soups.cli.app import build_app
from tests import oracles
from tests.experts import write_expert


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    for index, name in enumerate(("elementary", "concise")):
        write_expert(tmp_path / "experts" / name, seed=index)
    return tmp_path / "experts"


def psoups(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run one command in this process and return its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as caught:
        build_app()([str(arg) for arg in args], prog_name="psoups")
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def write_profiles(path: Path, count: int) -> Path:
    lines = [
        json.dumps({"user": f"u{n}", "weights": {"elementary": 0.1 * (n + 1), "concise": -0.5}}) for n in range(count)
    ]
    path.write_text("\n".join([*lines, "", ""]))
    return path


def test_every_line_becomes_an_adapter_and_a_second_run_resumes(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles = write_profiles(tmp_path / "users.jsonl", 3)
    args = ("--experts", experts, "--out", tmp_path / "out", "--json")
    code, out, _ = psoups(capsys, "merge-many", profiles, *args)
    assert code == 0
    assert json.loads(out) == {"folder": str(tmp_path / "out"), "users": 3, "written": 3, "kept": 0}
    want = oracles.soup([experts / "elementary", experts / "concise"], [0.3, -0.5])
    for module, delta in oracles.deltas(tmp_path / "out" / "u2").items():
        assert oracles.relative_error(delta, want[module]) < 1e-7
    write_profiles(profiles, 5)
    _, out, _ = psoups(capsys, "merge-many", profiles, *args)
    assert (json.loads(out)["written"], json.loads(out)["kept"]) == (2, 3)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"user": "u9", "weights": {"elementry": 1}}', "no expert is called 'elementry'"),
        ('{"user": "u9", "weigths": {"elementary": 1}}', "weigths"),
        ('{"user": "u9", "weights": {"elementary": NaN}}', "weights"),
        ('{"user": "u9", "weights": {"elementary": 1}, "user": "u8"}', "'user' is repeated"),
        ("[1]", "not a profile"),
        ("{", "not JSON"),
    ],
)
def test_an_error_in_the_last_line_is_reported_before_the_first_user_is_merged(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str], line: str, what: str
) -> None:
    profiles = write_profiles(tmp_path / "users.jsonl", 3)
    profiles.write_text(profiles.read_text().rstrip() + "\n" + line)
    code, _, err = psoups(capsys, "merge-many", profiles, "--experts", experts, "--out", tmp_path / "out")
    assert code == 2
    assert what in err
    assert f"{profiles}:4" in err
    assert not (tmp_path / "out").exists()


def test_an_empty_and_a_missing_file_of_profiles_are_reported(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    args = ("--experts", experts, "--out", tmp_path / "out")
    code, _, err = psoups(capsys, "merge-many", tmp_path / "empty.jsonl", *args)
    assert (code, "holds no profile" in err) == (2, True)
    code, _, err = psoups(capsys, "merge-many", tmp_path / "missing.jsonl", *args)
    assert (code, "give the path of an existing file" in err) == (2, True)


def test_a_pipe_of_profiles_is_rejected_since_profiles_are_read_twice(
    tmp_path: Path, experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    args = ("--experts", experts, "--out", tmp_path / "out")
    code, _, err = psoups(capsys, "merge-many", tmp_path / "pipe.jsonl", *args)
    assert (code, "write the profiles to a file" in err) == (2, True)
