"""`psoups profile` from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from personalized_soups.declare.loader import load_text
from personalized_soups.declare.profile import Profile
from tests.cli.conftest import Run
from tests.experts import write_expert


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSOUPS_PROFILES", raising=False)


def test_a_profile_is_written_read_and_deleted(psoups: Run) -> None:
    written = psoups("profile", "set", "u1", "--weights", "friendly=0.6,concise=-0.25", "--normalize", "sum")
    assert written == (0, "", "u1 is at version 1\n")
    code, out, err = psoups("profile", "get", "u1")
    expected = Profile(user="u1", weights={"friendly": 0.6, "concise": -0.25}, normalize="sum")
    assert load_text(out, Profile, "out") == expected
    assert (code, err.startswith("version 1, written 20")) == (0, True)

    code, out, _ = psoups(
        "profile", "set", "u1", "--weights", "friendly=1", "--method", "ties", "--expect", 1, "--json"
    )
    assert json.loads(out)["version"] == 2
    assert json.loads(out)["profile"] == {"user": "u1", "method": "ties", "weights": {"friendly": 1.0}}
    assert load_text(psoups("profile", "get", "u1", "--version", 1)[1], Profile, "out") == expected
    versions = json.loads(psoups("profile", "history", "u1", "--json")[1])
    assert [(each["version"], each["profile"]["weights"]) for each in versions] == [
        (1, {"friendly": 0.6, "concise": -0.25}),
        (2, {"friendly": 1.0}),
    ]
    printed = " ".join(psoups("profile", "history", "u1")[1].split())
    assert "friendly=0.6, concise=-0.25" in printed
    assert "friendly=1; method: ties" in printed

    code, _, err = psoups("profile", "set", "u1", "--weights", "friendly=2", "--expect", 1)
    assert (code, "'u1' is at version 2, but version 1 was expected" in err) == (1, True)
    code, _, err = psoups("profile", "delete", "u1")
    assert (code, "give --yes" in err) == (2, True)
    code, _, err = psoups("profile", "delete", "u1", "--yes", "--expect", 1)
    assert code == 1
    assert psoups("profile", "delete", "u1", "--yes") == (0, "", "u1 is deleted, with 2 versions and 0 answers\n")
    for ask in (("get", "u1"), ("history", "u1"), ("delete", "u1", "--yes")):
        code, out, err = psoups("profile", *ask)
        assert (code, out, "no profile of 'u1' is stored" in err) == (2, "", True)


def test_a_profile_file_is_written(psoups: Run, tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("method: ties\noptions: {density: 0.3}\nweights: {friendly: 0.5}\n")
    code, out, _ = psoups("profile", "set", "u7", "--file", "plain.yaml", "--json")
    assert code == 0
    assert json.loads(out)["profile"] == {
        "user": "u7", "method": "ties", "options": {"density": 0.3}, "weights": {"friendly": 0.5},
    }  # fmt: skip
    (tmp_path / "of-u8.yaml").write_text("user: u8\nweights: {friendly: 0.5}\n")
    code, _, err = psoups("profile", "set", "u7", "--file", "of-u8.yaml")
    assert (code, "the profile of the user 'u8', but USER is 'u7'" in err, "of-u8.yaml:1" in err) == (2, True, True)
    assert psoups("profile", "set", "u8", "--file", "of-u8.yaml")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["u1"], "exactly one"),
        (["u1", "--weights", "a=1", "--file", "x.yaml"], "exactly one"),
        (["u1", "--file", "x.yaml", "--normalize", "sum", "--allow-opposed"], "--normalize, --allow-opposed"),
        (["u1", "--weights", "a"], "is not `name=number`"),
        (["u1", "--weights", "a=1", "--normalize", "some"], "'some' is not a valid normalize"),
        (["u1", "--weights", "a=1", "--method", "tise"], "did you mean 'ties'"),
        (["", "--weights", "a=1"], "the user's name is empty"),
        (["u1", "--weights", "a=1", "--profiles", "mysql://h/d"], "only in SQLite or PostgreSQL"),
        (["u1", "--weights", "a=1", "--profiles", "missing/p.db"], "cannot be created"),
    ],
)
def test_errors_are_reported_and_create_no_store(psoups: Run, tmp_path: Path, arguments: list[str], what: str) -> None:
    code, out, err = psoups("profile", "set", *arguments)
    assert (code, out) == (2, "")
    assert what in err
    assert list(tmp_path.iterdir()) == []


def test_reading_creates_no_store(psoups: Run, tmp_path: Path) -> None:
    for arguments in (["get", "u1"], ["list"], ["history", "u1"], ["delete", "u1", "--yes"], ["export"]):
        code, out, err = psoups("profile", *arguments, "--profiles", "typo.db")
        assert (code, out, "the file does not exist" in err) == (2, "", True)
    assert list(tmp_path.iterdir()) == []


def test_the_store_may_come_from_the_environment(psoups: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PSOUPS_PROFILES", str(tmp_path / "other.db"))
    psoups("profile", "set", "u1", "--weights", "a=1")
    assert [path.name for path in tmp_path.iterdir()] == ["other.db"]


def test_pages_of_the_list_follow_each_other(psoups: Run, tmp_path: Path) -> None:
    names = [f"u{number}" for number in range(5)] + ["\x1b[31mred", "a'b"]
    lines = [json.dumps({"user": name, "weights": {"a": 0.5}}) for name in names]
    (tmp_path / "users.jsonl").write_text("\n".join(lines))
    psoups("profile", "import", "users.jsonl")
    seen: list[str] = []
    while True:
        _, out, err = psoups("profile", "list", "--limit", 2, "--after", seen[-1] if seen else "", "--json")
        seen += [each["user"] for each in json.loads(out)]
        if not err:
            break
        assert "there are more profiles: list them with --after " in err
    assert seen == sorted(names)
    _, out, err = psoups("profile", "list", "--limit", 1)
    assert "\x1b" not in out + err
    assert r"'\x1b[31mred'" in out
    assert "--after 'a'\"'\"'b'" in psoups("profile", "list", "--limit", 2)[2]


def test_an_export_can_be_imported(psoups: Run, tmp_path: Path) -> None:
    names = ["u1", "'; DROP TABLE psoups_profiles; --", "../..", "\x01\x7f", "😀", "é", "anonymous", "a\u2028b"]
    lines = [
        json.dumps({"user": name, "weights": {"friendly": number / 7 + 0.1}, "normalize": "sum"})
        for number, name in enumerate(names)
    ]
    (tmp_path / "users.jsonl").write_text("\n".join(lines))
    code, out, _ = psoups("profile", "import", "users.jsonl", "--json")
    assert (code, json.loads(out)) == (0, {"profiles": 8, "written": 8, "there_already": 0})
    _, out, _ = psoups("profile", "export")
    # split at line ends alone: U+2028 is none
    exported = [json.loads(line) for line in out.split("\n")[:-1]]
    assert exported == sorted((json.loads(line) for line in lines), key=lambda each: str(each["user"]))
    psoups("profile", "export", "--out", "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == out
    code, _, err = psoups("profile", "export", "--out", "out.jsonl")
    assert (code, "already exists" in err) == (2, True)
    assert psoups("profile", "export", "--out", "out.jsonl", "--overwrite")[0] == 0
    printed = psoups("profile", "import", "out.jsonl", "--json")[1]
    assert json.loads(printed) == {"profiles": 8, "written": 0, "there_already": 8}
    psoups("profile", "import", "out.jsonl", "--profiles", "other.db")
    assert psoups("profile", "export", "--profiles", "other.db")[1] == out


def test_an_invalid_last_line_leaves_the_store_unchanged(psoups: Run, tmp_path: Path) -> None:
    psoups("profile", "set", "u1", "--weights", "a=1")
    good = '{"user": "u%d", "weights": {"a": 2}}\n'
    for last, what in (('{"user": "u9", "weigths": {"a": 1}}', "did you mean"), (good % 3, "has two profiles")):
        (tmp_path / "users.jsonl").write_text("".join(good % number for number in range(5)) + last)
        code, _, err = psoups("profile", "import", "users.jsonl")
        assert (code, what in err, "users.jsonl:6" in err) == (2, True, True)
    assert [each["user"] for each in json.loads(psoups("profile", "list", "--json")[1])] == ["u1"]


def test_skip_bad_skips_and_reports_every_invalid_line(psoups: Run, tmp_path: Path) -> None:
    write_expert(tmp_path / "experts" / "expert", seed=0)
    good = '{"user": "u%d", "weights": {"expert": 2}}'
    lines = [good % 1, "{", good % 2, '{"user": "u9", "weigths": {"expert": 1}}', good % 1,
             '{"user": "u3", "weights": {"export": 1}}', good % 3, ""]  # fmt: skip
    (tmp_path / "users.jsonl").write_bytes("\n".join(lines).encode() + b"\xff\n" + (good % 4).encode())
    ask = ("profile", "import", "users.jsonl", "--experts", "experts")
    code, out, err = psoups(*ask)
    assert (code, out, "users.jsonl:2" in err) == (2, "", True)
    assert json.loads(psoups("profile", "list", "--json")[1]) == []  # all or nothing without the option

    code, out, err = psoups(*ask, "--skip-bad", "--json")
    printed = json.loads(out)
    skipped = printed.pop("skipped")
    assert (code, printed) == (0, {"profiles": 4, "written": 4, "there_already": 0})
    reasons = {2: "not JSON", 4: "weigths", 5: "the user 'u1' has two profiles", 6: "'export'", 8: "not UTF-8"}
    assert [each["where"].split(":")[:2] for each in skipped] == [["users.jsonl", str(number)] for number in reasons]
    for each, reason in zip(skipped, reasons.values(), strict=True):
        assert reason in each["what"]
        assert each["mend"]
        (line,) = [line for line in err.splitlines() if line.startswith(f"skipped {each['where']}: ")]
        assert reason in line
    stored = json.loads(psoups("profile", "list", "--json")[1])
    assert [(each["user"], each["version"]) for each in stored] == [(f"u{number}", 1) for number in range(1, 5)]

    # once the lines are mended the same file is imported again: what is there already is not written twice
    lines[1:2] = [good % 5]
    (tmp_path / "users.jsonl").write_text("\n".join([*lines, good % 4]))
    code, out, err = psoups(*ask, "--skip-bad")
    record = " ".join(out.split())
    assert (code, record) == (0, "profiles 5 written 1 there already 4 skipped 3")
    assert err.count("skipped users.jsonl:") == 3


def test_a_file_without_a_valid_line_is_rejected_and_its_lines_are_reported(psoups: Run, tmp_path: Path) -> None:
    (tmp_path / "users.jsonl").write_text("{\n\n[]\n")
    code, out, err = psoups("profile", "import", "users.jsonl", "--skip-bad")
    assert (code, out, err.count("skipped users.jsonl:"), "no valid line" in err) == (2, "", 2, True)
    (tmp_path / "users.jsonl").write_text("")
    code, out, _ = psoups("profile", "import", "users.jsonl", "--skip-bad", "--json")
    assert (code, json.loads(out)["skipped"]) == (0, [])
    code, _, err = psoups("profile", "import", "missing.jsonl", "--skip-bad")
    assert (code, "cannot be read" in err) == (2, True)


def test_profiles_are_checked_against_experts(psoups: Run, tmp_path: Path) -> None:
    for seed, name in enumerate(("elementary", "expert")):
        write_expert(tmp_path / "experts" / name, seed=seed)
    code, _, err = psoups("profile", "set", "u1", "--weights", "elementry=1", "--experts", "experts")
    assert (code, "did you mean 'elementary'?" in err) == (2, True)
    both = ("profile", "set", "u1", "--weights", "elementary=1,expert=1", "--experts", "experts")
    code, _, err = psoups(*both)
    assert (code, "two sides of one dimension" in err) == (2, True)
    assert psoups(*both, "--allow-opposed")[0] == 0
    (tmp_path / "users.jsonl").write_text('{"user": "u2", "weights": {"friendly": 1}}\n')
    code, _, err = psoups("profile", "import", "users.jsonl", "--experts", "experts")
    assert (code, "no expert is called 'friendly'" in err) == (2, True)


def test_delete_asks_for_confirmation(psoups: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    psoups("profile", "set", "u1", "--weights", "a=1")
    psoups("profile", "set", "u1", "--weights", "a=2")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def answer(question: str, *, err: bool) -> bool:
        assert err  # standard output is for data
        asked.append(question)
        return len(asked) == 2

    monkeypatch.setattr("typer.confirm", answer)
    assert psoups("profile", "delete", "u1")[0] == 1
    assert psoups("profile", "get", "u1")[0] == 0
    assert psoups("profile", "delete", "u1")[0] == 0
    assert asked == ["Delete u1 with 2 versions and 0 answers?"] * 2
    assert psoups("profile", "get", "u1")[0] == 2


def test_the_command_loads_no_torch_and_its_help_no_database(tmp_path: Path) -> None:
    code = """
import sys
from personalized_soups.cli.app import build_app
try:
    build_app()(["profile", "set", "--help"])
except SystemExit as done:
    assert not done.code, done.code
assert {"sqlalchemy", "sqlite3", "psycopg"}.isdisjoint(sys.modules)
try:
    build_app()(["profile", "set", "u1", "--weights", "a=1"])
except SystemExit as done:
    assert not done.code, done.code
assert "sqlalchemy" in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=280, cwd=tmp_path, stdout=subprocess.DEVNULL)
