"""`psoups judge agreement`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.scoring.judging.endpoints import Response, completion, endpoint


@pytest.fixture
def people(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"Why {number}?", "first": "Short.", "second": "A long one.", "preferred": preferred}
        for number, preferred in enumerate(["first", "first", "second", "tie"])
    ]
    path = tmp_path / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_scorer_and_people(psoups: Run, people: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text("judge: {kind: scorer, scorer: {kind: length, low: 0, high: 9}, end: low}\n")
    code, out, _ = psoups("judge", "agreement", str(people), "--judge", str(tmp_path / "judge.yaml"), "--json")
    assert code == 0
    found = json.loads(out)
    scorer = {"kind": "length", "low": 0, "high": 9}
    assert found["judge"] == {"kind": "scorer", "scorer": scorer, "end": "low", "min_gap": 0.0}
    assert found["biases"]["counts"] == {"first": 4, "second": 0, "tie": 0, "unparsed": 0}
    assert found["biases"]["longer"]["value"] == 0.0
    assert found["agreement"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["agreement"]["longer"]["value"] == pytest.approx(1 / 3)
    assert found["traffic"] == {}


def test_an_llm_judge_reports_what_it_cost(
    psoups: Run, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judge.yaml").write_text("judge: {kind: llm, model: m, prices: {input: 1, output: 1}}\n")
    arguments = ("judge", "agreement", str(people), "--judge", str(tmp_path / "judge.yaml"), "--criterion", "Be brief")

    def prefers_the_short(body: dict[str, Any], before: int) -> Response:
        return completion("A" if 'Answer A: "Short."' in body["messages"][0]["content"] else "B")

    with endpoint(prefers_the_short) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        first = psoups(*arguments)
        again = psoups(*arguments)
        limited = psoups(*arguments, "--limit", "2")
        own = psoups(*arguments, "--cache", str(tmp_path / "own.sqlite"), "--limit", "1")
    assert [code for code, *_ in (first, again, limited, own)] == [0, 0, 0, 0]
    assert "8 asked, 0 from the cache" in first[1]
    assert "first 4, second 0, tie 0, unparsed 0" in " ".join(first[1].split())
    assert "0 asked, 8 from the cache" in again[1]
    assert "0 asked, 4 from the cache" in limited[1]
    assert "2 asked, 0 from the cache" in own[1]
    assert len(server.requests) == 10
    assert all("Criterion: Be brief" in body["messages"][0]["content"] for body in server.requests)


def test_an_endpoint_that_is_down_ends_with_a_message(
    psoups: Run, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judge.yaml").write_text("judge: {kind: llm, model: m, max_retries: 0}\n")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")  # nothing listens on the port `discard`
    code, _, err = psoups("judge", "agreement", str(people), "--judge", str(tmp_path / "judge.yaml"))
    assert code == 1
    assert "error: the endpoint gave no reply in 1 tries" in err
    assert "Traceback" not in err
