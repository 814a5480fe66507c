"""`psoups data`: rollouts, labels and pairs, one step at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.training.data import read_preferences
from personalized_soups.training.labels import read_labels
from personalized_soups.training.rollouts import read_pool
from tests.cli.conftest import Run
from tests.scoring.judging.endpoints import Response, completion, endpoint, error

CATALOGUE = """
dimensions:
  informativeness:
    about: How much the answer says.
    scorer: {kind: length, low: 0, high: 20}
    sides:
      concise: {instruction: Be brief., end: low}
      informative: {instruction: Tell all.}
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a folder with a catalogue, prompts and the declaration of a judge."""
    (tmp_path / "dimensions.yaml").write_text(CATALOGUE)
    (tmp_path / "prompts.txt").write_text("wash the kettle\nrub the towel\ndry it\n")
    (tmp_path / "judge.yaml").write_text("judge: {kind: llm, model: m, max_retries: 0, concurrency: 1}\n")
    return tmp_path


def rollouts(psoups: Run, files: Path, small_base: Path, *more: object) -> tuple[int, str, str]:
    sampling = (
        "--num-samples",
        4,
        "--max-new-tokens",
        24,
        "--device",
        "cpu",
        "--dimensions",
        files / "dimensions.yaml",
    )
    given = ("--base", small_base, "--prompts", files / "prompts.txt", "--out", files / "rollouts.jsonl")
    return psoups("data", "rollouts", *given, *sampling, *more)


def label(psoups: Run, files: Path, *more: object, side: str = "concise") -> tuple[int, str, str]:
    given = ("--side", side, "--out", files / "labels.jsonl", "--dimensions", files / "dimensions.yaml")
    return psoups("data", "label", files / "rollouts.jsonl", *given, *more)


def test_three_steps_give_the_pairs_of_the_short_way(psoups: Run, files: Path, small_base: Path) -> None:
    code, out, _ = rollouts(psoups, files, small_base, "--instructed", 2, "--json")
    assert code == 0
    assert json.loads(out) == {"file": str(files / "rollouts.jsonl"), "prompts": 3, "answers": 12}
    pool = read_pool(files / "rollouts.jsonl")
    assert [each.prompt for each in pool] == ["wash the kettle", "rub the towel", "dry it"]
    assert all(set(each.instructions) == {None, "Be brief.", "Tell all."} for each in pool)
    assert not list(files.glob(".*"))  # the journal is gone

    code, out, _ = label(psoups, files, "--json")
    assert code == 0
    record = json.loads(out)
    assert (record["side"], record["prompts"]) == ("concise", 3)
    assert record["invalid"] == sum(
        score is None for line in read_labels(files / "labels.jsonl") for score in line.scores
    )

    code, out, _ = psoups(
        "data",
        "pairs",
        files / "labels.jsonl",
        "--out",
        files / "pairs.jsonl",
        "--min-gap",
        0.05,
        "--messages",
        "--json",
    )
    assert code == 0
    short = (
        "--pool",
        files / "rollouts.jsonl",
        "--out",
        files / "short.jsonl",
        "--dimensions",
        files / "dimensions.yaml",
    )
    assert psoups("pairs", "concise", "--base", small_base, *short, "--min-gap", 0.05)[0] == 0
    assert (files / "pairs.jsonl").read_bytes() == (files / "short.jsonl").read_bytes()
    assert json.loads(out)["pairs"] == len(read_preferences(files / "pairs.jsonl").pairs)


def written(files: Path) -> None:
    rows = [
        {"prompt": f"Why {number}?", "answers": [f"Short {number}.", "A rather long answer."]} for number in range(3)
    ]
    (files / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_judge_that_fails_is_asked_only_for_the_rest(
    psoups: Run, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(files)
    is_down = True

    def prefers_short(body: dict[str, Any], before: int) -> Response:
        question = body["messages"][0]["content"]
        if is_down and before >= 3:
            return error(503, "out of order")
        if '"Why 2?"' in question:
            return completion("tie")
        return completion("A" if 'Answer A: "Short' in question else "B")

    judge = ("--judge", files / "judge.yaml", "--cache", files / "replies.sqlite")
    with endpoint(prefers_short) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        code, _, err = label(psoups, files, *judge)
        assert code == 1
        assert "error: the endpoint gave no reply in 1 tries: " in err
        assert "not asked for again" in err
        is_down = False
        code, out, _ = label(psoups, files, *judge, "--json")
        assert code == 0
    questions = [body["messages"][0]["content"] for body in server.requests]
    assert [questions.count(question) for question in questions[:3]] == [1, 1, 1]  # kept, and not asked for again
    assert len(set(questions)) == 6
    record = json.loads(out)
    assert [record[verdict] for verdict in ("tie", "unparsed")] == [1, 0]
    assert record["first"] + record["second"] == 2
    assert record["orders disagree"].startswith("0.000")
    assert all("Criterion: Be brief." in body["messages"][0]["content"] for body in server.requests)

    code, out, _ = psoups(
        "data",
        "pairs",
        files / "labels.jsonl",
        "--out",
        files / "pairs.jsonl",
        "--ties",
        files / "ties.jsonl",
        "--json",
    )
    assert code == 0
    assert (json.loads(out)["pairs"], json.loads(out)["ties"]) == (2, 1)
    assert sorted(pair["chosen"] for pair in read_preferences(files / "pairs.jsonl").pairs) == ["Short 0.", "Short 1."]
    assert [pair["prompt"] for pair in read_preferences(files / "ties.jsonl").pairs] == ["Why 2?"] * 2


def test_wrong_usage_and_data(psoups: Run, files: Path, small_base: Path) -> None:
    written(files)
    for arguments, code, message in (
        (
            (
                "data",
                "rollouts",
                "--base",
                small_base,
                "--prompts",
                files / "prompts.txt",
                "--out",
                files / "rollouts.jsonl",
            ),
            2,
            "already exists",
        ),
        (
            ("data", "label", files / "rollouts.jsonl", "--side", "concice", "--out", files / "l.jsonl"),
            2,
            "did you mean 'concise'?",
        ),
        (
            (
                "data",
                "label",
                files / "rollouts.jsonl",
                "--side",
                "concise",
                "--out",
                files / "l.jsonl",
                "--comparisons",
                2,
            ),
            2,
            "--comparisons",
        ),
        (
            ("data", "label", files / "nothing.jsonl", "--side", "concise", "--out", files / "l.jsonl"),
            2,
            "cannot be read",
        ),
        (("data", "pairs", files / "rollouts.jsonl", "--out", files / "p.jsonl"), 2, "rollouts.jsonl:1"),
        (("data", "pairs", files / "rollouts.jsonl", "--out", files / "p.jsonl", "--min-gap", 0), 2, "--min-gap"),
        (("data", "pairs", files / "rollouts.jsonl", "--out", files / "none" / "p.jsonl"), 2, "does not exist"),
    ):
        found, _, err = psoups(*arguments)
        assert (found, message in err) == (code, True), err
    with (files / "rollouts.jsonl").open("a") as file:
        file.write('{"prompt": "Why 0?", "answers": ["x", "y"]}\n')
    code, _, err = label(psoups, files)
    assert code == 2
    assert "prompt 4 of the file repeats prompt 1: 'Why 0?'" in err
    assert not (files / "labels.jsonl").exists()
