"""The batcher on a GPU: answers are those of each request alone on the CPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.serving.engine.limits import Limits
from tests.serving.engine.worlds import RunningBatcher, check_alone, small_soup, some_request


@pytest.fixture(scope="module")
def tokenizer(small_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_base)


@pytest.mark.gpu
def test_on_a_gpu_answers_are_those_of_each_alone_on_the_cpu(tmp_path: Path, tokenizer: Any) -> None:
    soup = small_soup(tmp_path / "cpu", tokenizer=tokenizer)
    on_gpu = small_soup(tmp_path / "gpu", tokenizer=tokenizer).to("cuda")
    chance = random.Random(0)
    requests = [some_request(chance, most=10, longest=24) for _ in range(12)]
    with RunningBatcher(on_gpu, Limits(read_tokens=9, max_rows=5)) as running:
        running.answer(requests)
        check_alone(soup, running, requests)
