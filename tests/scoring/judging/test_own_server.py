"""The judge over a real socket against `psoups serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from personalized_soups.declare.judge import LlmJudgeSpec
from personalized_soups.errors import UsageError
from personalized_soups.scoring.judging.llm_judge import LlmJudge
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers
from personalized_soups.scoring.judging.template import JudgeTemplate
from tests.mixing.worlds import write_experts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serving.servers import RunningServer

TEMPLATE = JudgeTemplate("{criterion}? {prompt} A: {first} B: {second}")  # fits the small base's context of 256 tokens
SPEC = LlmJudgeSpec(kind="llm", model="small", max_tokens=8, concurrency=2)


@pytest.fixture(scope="module")
def served(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    from personalized_soups.serving.engine.limits import Limits
    from personalized_soups.serving.web.settings import Settings
    from tests.serving.servers import running

    experts = tmp_path_factory.mktemp("served") / "experts"
    write_experts(experts)
    settings = Settings("small", limits=Limits(max_rows=4, max_context=256))
    with running(small_base, experts, settings, dtype="auto") as server:
        yield server


def test_our_own_server_is_asked_in_both_orders(
    served: RunningServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/v1")
    with LlmJudge(SPEC, TEMPLATE, cache=tmp_path / "replies.sqlite") as judge:
        first = judge.compare([ComparedAnswers("Why?", "Yes.", "No.", "Short")])
        assert judge.traffic.num_asked == 2
        assert judge.traffic.num_retries == 0
        assert judge.traffic.input_tokens > 10
        assert 0 < judge.traffic.output_tokens <= 16
        assert judge.traffic.models == {"small"}
        # a base with random weights gives no verdict, and none is guessed
        assert [judgement.verdict for judgement in first] == ["unparsed"]
        assert judge.compare([ComparedAnswers("Why?", "Yes.", "No.", "Short")]) == first
        assert judge.traffic.num_asked == 2


def test_a_model_that_our_server_lacks(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{served.url}/v1")
    with (
        LlmJudge(SPEC.replaced(model="nobody"), TEMPLATE) as judge,
        pytest.raises(UsageError, match="status 404") as caught,
    ):
        judge.compare([ComparedAnswers("Why?", "Yes.", "No.", "Short")])
    assert "'nobody'" in caught.value.mend
