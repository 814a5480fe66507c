from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.errors import UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.training import resumable_sampling as module
from personalized_soups.training.resumable_sampling import sample_kept
from personalized_soups.training.rollouts import Sampled

PROMPTS = [f"wash the kettle {number}" for number in range(7)]
OPTIONS: dict[str, Any] = {"base": "b", "num_samples": 2, "max_new_tokens": 5, "batch_size": 4, "seed": 3}


@pytest.fixture(scope="module")
def generator(small_base: Path) -> Generator:
    return Generator.open(small_base, device="cpu")


@pytest.fixture(autouse=True)
def _small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCHES", 1)  # two prompts a portion


def test_portions_give_the_answers_of_the_whole(generator: Generator, tmp_path: Path) -> None:
    done: list[int] = []
    pool = sample_kept(generator, PROMPTS, kept=tmp_path / "k", on_done=done.append, **OPTIONS)
    assert done == [4, 8, 12, 14]
    options = {key: OPTIONS[key] for key in ("num_samples", "max_new_tokens", "seed")}
    assert pool == [Sampled(p, tuple(a)) for p, a in zip(PROMPTS, generator.answers(PROMPTS, **options), strict=True)]


@pytest.mark.parametrize(("lines_left", "kept_answers"), [(1, 0), (2, 0), (3, 4), (4, 4), (5, 8), (8, 14)])
@pytest.mark.parametrize("torn", [b"", b'{"prompt": "wash the ket'])
def test_cut_short_at_any_line_it_goes_on_to_the_same_answers(
    generator: Generator, tmp_path: Path, lines_left: int, kept_answers: int, torn: bytes
) -> None:
    kept = tmp_path / "kept"
    whole = sample_kept(generator, PROMPTS, kept=kept, **OPTIONS)
    content = kept.read_bytes()
    kept.write_bytes(b"".join(content.splitlines(keepends=True)[:lines_left]) + torn)
    begun: list[int] = []
    done: list[int] = []
    again = sample_kept(generator, PROMPTS, kept=kept, on_begin=begun.append, on_done=done.append, **OPTIONS)
    assert again == whole
    assert kept.read_bytes() == content
    assert begun == [kept_answers]
    assert done == [answers for answers in (4, 8, 12, 14) if answers > kept_answers]


def test_an_unfinished_sampling_of_other_answers_is_not_thrown_away(generator: Generator, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    sample_kept(generator, PROMPTS, kept=kept, **OPTIONS)
    content = kept.read_bytes()
    unfinished = b"".join(content.splitlines(keepends=True)[:4])
    for other in ({"seed": 4}, {"base": "c"}, {"temperature": 0.5}):
        kept.write_bytes(unfinished)
        with pytest.raises(UsageError, match=f"differ in {next(iter(other))}\n") as caught:
            sample_kept(generator, PROMPTS, kept=kept, **{**OPTIONS, **other})
        assert caught.value.where == str(kept)
        assert kept.read_bytes() == unfinished
    with pytest.raises(UsageError, match="num_prompts, prompts"):
        sample_kept(generator, PROMPTS[:6], kept=kept, **OPTIONS)
    kept.write_bytes(content)  # a finished file is replaced: other settings ask for new answers
    sample_kept(generator, PROMPTS, kept=kept, **{**OPTIONS, "seed": 4})
    assert json.loads(kept.read_bytes().splitlines()[0])["seed"] == 4
