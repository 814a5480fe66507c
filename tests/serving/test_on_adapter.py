"""A server on top of an SFT adapter: every answer, also the base's, is that of base + adapter + soup."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from personalized_soups import Generator, SoupModel
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.settings import Settings
from tests.base_adapters import trained_on, write_sft
from tests.mixing.worlds import write_experts
from tests.serving.servers import RunningServer, running

CHAT = [{"role": "user", "content": "wash the old kettle"}]
PROFILES: list[dict[str, float] | None] = [{"cold": 0.6, "warm": 0.5}, None, {"plain": 1.3}]


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sft(tmp_path_factory.mktemp("adapters") / "sft", size=0.4)


@pytest.fixture(scope="module")
def experts(sft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts_on_sft") / "experts"
    for expert in write_experts(folder):
        trained_on(expert, sft)
    return folder


@pytest.fixture(scope="module")
def served(small_base: Path, sft: Path, experts: Path) -> Iterator[RunningServer]:
    settings = Settings("small", limits=Limits(max_rows=4, max_context=128), default_max_tokens=12)
    with running(small_base, experts, settings, on=sft) as found:
        yield found


def answer(served: RunningServer, weights: dict[str, float] | None) -> str:
    body: dict[str, Any] = {"model": "small", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    if weights is not None:
        body["profile"] = {"weights": weights}
    reply = served.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 200, reply.json
    return str(reply.json["choices"][0]["message"]["content"]).strip()


def test_answers_are_those_of_base_adapter_and_soup(
    served: RunningServer, small_base: Path, sft: Path, experts: Path
) -> None:
    model = SoupModel.from_pretrained(small_base, experts, on=sft, device="cpu")
    bare = Generator.open(small_base, device="cpu").answers([CHAT], greedy=True, max_new_tokens=12)[0][0].strip()
    # asked twice, because the second answer starts from cached keys and values
    for _ in range(2):
        for weights in PROFILES:
            assert answer(served, weights) == model.generate([CHAT], [weights], max_new_tokens=12)[0]
    assert answer(served, None) != bare


def test_a_reload_refuses_an_expert_of_another_adapter(
    served: RunningServer, sft: Path, experts: Path, tmp_path: Path
) -> None:
    before = answer(served, {"cold": 1.0})
    weights = experts / "cold" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * 3 for name, tensor in tensors.items()}, weights, {"format": "pt"})
    trained_on(experts / "cold", write_sft(tmp_path / "other", seed=5))
    reply = served.ask("POST", "/v1/experts/reload")
    assert reply.status == 409, reply.json
    assert "not trained on top of the adapter" in str(reply.json)
    trained_on(experts / "cold", sft)
    assert served.ask("POST", "/v1/experts/reload").status == 200
    save_file(tensors, weights, {"format": "pt"})
    assert served.ask("POST", "/v1/experts/reload").status == 200
    assert answer(served, {"cold": 1.0}) == before
