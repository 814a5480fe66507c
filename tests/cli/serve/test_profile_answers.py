"""The answers of users at the command line: shown, expired, deleted with their user, exported and imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from personalized_soups.users.profiles.store import ProfileStore
from tests.cli.conftest import Run
from tests.users.profiles.evidence import answered
from tests.users.profiles.writers import profile_of


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PSOUPS_PROFILES", raising=False)


@pytest.fixture
def store(tmp_path: Path, _in_an_empty_folder: None) -> Iterator[ProfileStore]:
    """Return a store with a profile and answers of ada, and answers of bob, who has no profile."""
    long = answered("q3", "a").question.replaced(a="A very long answer\n\x1b[31m" * 20)
    with ProfileStore.open("profiles.db") as store:
        store.put(profile_of("ada", 0.5))
        store.answers.add("ada", answered("q1", "b", swapped=True))
        store.answers.add("ada", answered("q2", "tie", answered_at=datetime.now(UTC) - timedelta(days=40)))
        store.answers.add("bob", answered("q3", "a").replaced(question=long))
        yield store


def test_answers_are_shown(store: ProfileStore, psoups: Run) -> None:
    code, out, _ = psoups("profile", "answers", "ada", "--json")
    assert code == 0
    assert json.loads(out) == [each.model_dump(mode="json", exclude_defaults=True) for each in store.answers.of("ada")]
    assert [each["answer"]["choice"] for each in json.loads(out)] == ["b", "tie"]
    printed = " ".join(psoups("profile", "answers", "ada")[1].split())
    assert "the prompt of q1 q1 two" in printed
    assert "tie the prompt of q2" in printed
    _, out, err = psoups("profile", "answers", "bob")
    assert "\x1b" not in out + err
    assert "A very long answer" in " ".join(out.split())
    assert psoups("profile", "answers", "eve") == (0, "", "no answers of eve are stored\n")
    assert psoups("profile", "answers", "eve", "--json") == (0, "[]\n", "")
    code, _, err = psoups("profile", "answers", "ada", "--profiles", "typo.db")
    assert (code, "the file does not exist" in err) == (2, True)


def test_old_answers_expire(store: ProfileStore, psoups: Run) -> None:
    assert psoups("profile", "expire", "--answers-older-than", 41) == (0, "", "0 answers older than 41 days deleted\n")
    code, out, _ = psoups("profile", "expire", "--answers-older-than", 39.5, "--json")
    assert (code, json.loads(out)) == (0, {"deleted_answers": 1})
    assert [each.question.id for each in store.answers.of("ada")] == ["q1"]
    assert psoups("profile", "expire", "--answers-older-than", 0)[2] == "2 answers older than 0 days deleted\n"
    assert list(store.answers.users()) == []
    assert store.get("ada").version == 1
    for wrong in ([], ["--answers-older-than", "-1"], ["--answers-older-than", "1e9"]):
        assert psoups("profile", "expire", *wrong)[0] == 2


def test_a_deletion_says_how_many_answers_it_deleted(
    store: ProfileStore, psoups: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert psoups("profile", "delete", "ada", "--yes")[2] == "ada is deleted, with 1 version and 2 answers\n"
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def answer(question: str, *, err: bool) -> bool:
        asked.append(question)
        return err

    monkeypatch.setattr("typer.confirm", answer)
    assert psoups("profile", "delete", "bob")[2] == "bob is deleted, with 0 versions and 1 answer\n"
    assert asked == ["Delete bob with 0 versions and 1 answer?"]
    code, _, err = psoups("profile", "delete", "bob")
    assert (code, "no profile of 'bob' is stored" in err, len(asked)) == (2, True, 1)
    assert list(store.answers.users()) == []


def test_an_export_with_answers_can_be_imported(store: ProfileStore, psoups: Run) -> None:
    assert [json.loads(line)["user"] for line in psoups("profile", "export")[1].splitlines()] == ["ada"]
    _, out, _ = psoups("profile", "export", "--with-answers")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["user"], sorted(line)) for line in lines] == [
        ("ada", ["user", "weights"]),
        ("ada", ["answers", "user"]),
        ("bob", ["answers", "user"]),
    ]
    code, _, err = psoups("profile", "export", "--with-answers", "--out", "all.jsonl")
    assert (code, err) == (0, "1 profile and the answers of 2 users in all.jsonl\n")
    assert [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()] == lines

    code, out, _ = psoups("profile", "import", "all.jsonl", "--profiles", "other.db", "--json")
    assert (code, json.loads(out)) == (
        0,
        {"profiles": 1, "written": 1, "there_already": 0, "answers": 3, "answers_written": 3},
    )
    with ProfileStore.open("other.db") as other:
        assert list(other.answers.users()) == ["ada", "bob"]
        for user in ("ada", "bob"):
            assert other.answers.of(user) == store.answers.of(user)
    again = json.loads(psoups("profile", "import", "all.jsonl", "--json")[1])
    assert (again["written"], again["answers_written"]) == (0, 0)


def test_another_answer_in_a_file_is_refused_skipped_or_imported(store: ProfileStore, psoups: Run) -> None:
    answers = [answered("q1", "a"), answered("q7", "a")]
    line = {"user": "ada", "answers": [each.model_dump(mode="json") for each in answers]}
    Path("some.jsonl").write_text(json.dumps(line) + "\n")
    code, _, err = psoups("profile", "import", "some.jsonl")
    words = " ".join(err.split())
    assert code == 1
    assert "another answer of 'ada' to the question 'q1' is stored" in words
    assert "replace stored answers (--replace-answers)" in words
    assert store.answers.count("ada") == 2
    code, out, err = psoups("profile", "import", "some.jsonl", "--skip-bad", "--json")
    assert (code, json.loads(out)["answers_written"], len(json.loads(out)["skipped"])) == (0, 1, 1)
    assert "--replace-answers" in " ".join(err.split())
    assert [each.answer.choice for each in store.answers.of("ada")] == ["b", "tie", "a"]
    code, out, _ = psoups("profile", "import", "some.jsonl", "--replace-answers", "--json")
    assert (code, json.loads(out)["answers_written"]) == (0, 1)
    assert [each.answer.choice for each in store.answers.of("ada")] == ["a", "tie", "a"]
