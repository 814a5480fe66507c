"""The likelihood of texts is that of a float64 model with the soup folded in; a generation is one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from personalized_soups import Example, ExpertWeights, SoupModel, TextLikelihood
from personalized_soups.errors import DeclarationError, InputError, RunError, UsageError
from tests.mixing.worlds import LOGITS, true_logits

EXAMPLES = [
    Example(prompt="wash the kettle", text="rub it dry"),
    Example(prompt="soap", text="wash it with warm water and soap, then rub it dry with a clean towel"),
    Example(prompt="how do I wash the old kettle so that it looks nice again?", text="no"),
]
CANDIDATES = [{"cold": 0.9, "warm": -0.4}, {}, {"plain": 1.3}]


@contextmanager
def counted(model: SoupModel, most_rows: int | None = None) -> Iterator[list[int]]:
    """Yield the rows of each forward pass. A pass with more than `most_rows` runs out of memory."""
    rows: list[int] = []

    def hook(_: Any, arguments: Any, keywords: Any) -> None:
        rows.append(keywords["input_ids"].shape[0])
        if most_rows is not None and rows[-1] > most_rows:
            raise torch.OutOfMemoryError("no room")

    handle = model.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def expected(base: Path, folders: list[Path], weights: dict[str, float], example: Example) -> tuple[float, float]:
    """Return the mean log-probability per token and the largest logit. The template is applied by hand, in float64."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    before = f"<|user|>{example.prompt}<|assistant|>"
    prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
    ids = tokenizer(f"{before}{example.text}<|eos|>", add_special_tokens=False)["input_ids"]
    assert ids[: len(prompt)] == prompt
    logits = true_logits(base, folders, weights, torch.tensor(ids))
    shares = logits.log_softmax(-1)
    tokens = range(len(prompt), len(ids))
    return float(np.mean([float(shares[place - 1, ids[place]]) for place in tokens])), float(logits.abs().max())


def test_scores_are_those_of_a_float64_model(model: SoupModel, folders: list[Path], small_base: Path) -> None:
    scores = TextLikelihood(model, EXAMPLES).scores([ExpertWeights(each) for each in CANDIDATES], [0, 1, 2], draw=0)
    for row, weights in zip(scores, CANDIDATES, strict=True):
        for score, example in zip(row, EXAMPLES, strict=True):
            want, largest = expected(small_base, folders, weights, example)
            # a logit and the log of the sum of all exponentials each have an error of LOGITS times the largest logit
            assert abs(score - want) < 2 * LOGITS * max(1.0, largest)
    assert len({round(float(score), 3) for score in scores[:, 0]}) == 3


def test_the_items_that_are_asked_for_come_in_their_order(model: SoupModel) -> None:
    likelihood = TextLikelihood(model, EXAMPLES)
    candidates = [ExpertWeights(each) for each in CANDIDATES]
    whole = likelihood.scores(candidates, [0, 1, 2], draw=0)
    some = likelihood.scores(candidates[::-1], [2, 0], draw=1)
    assert some == pytest.approx(whole[::-1][:, [2, 0]], abs=1e-5)


@pytest.mark.parametrize(
    ("batch_size", "rows"),
    [(9, [9]), (8, [6, 3]), (4, [3, 3, 3]), (2, [2, 2, 2, 2, 1]), (1, [1] * 9)],
)
def test_candidates_and_texts_share_batches(model: SoupModel, batch_size: int, rows: list[int]) -> None:
    candidates = [ExpertWeights(each) for each in CANDIDATES]
    whole = TextLikelihood(model, EXAMPLES, batch_size=100).scores(candidates, [0, 1, 2], draw=0)
    with counted(model) as passes:
        scores = TextLikelihood(model, EXAMPLES, batch_size=batch_size).scores(candidates, [0, 1, 2], draw=0)
    assert sorted(passes) == sorted(rows)
    assert scores == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("most_rows", [1, 2, 5, 8])
def test_a_batch_that_does_not_fit_is_halved(model: SoupModel, most_rows: int) -> None:
    candidates = [ExpertWeights(each) for each in CANDIDATES]
    likelihood = TextLikelihood(model, EXAMPLES)
    whole = likelihood.scores(candidates, [0, 1, 2], draw=0)
    with counted(model, most_rows) as passes:
        assert likelihood.scores(candidates, [0, 1, 2], draw=0) == pytest.approx(whole, abs=1e-5)
    assert passes[0] == 9
    assert sum(rows for rows in passes if rows <= most_rows) == 9


def test_a_row_that_does_not_fit_is_an_error(model: SoupModel) -> None:
    with counted(model, 0), pytest.raises(RunError, match="no room for one example") as caught:
        TextLikelihood(model, EXAMPLES).scores([ExpertWeights()], [0, 1, 2], draw=0)
    assert "shorter" in caught.value.mend


def test_weights_by_layer_change_their_layers_only(model: SoupModel) -> None:
    likelihood = TextLikelihood(model, EXAMPLES)
    everywhere = {"*.layers.0.*": 0.8, "*.layers.1.*": 0.8}
    first = {"*.layers.0.*": 0.8, "*.layers.1.*": 0.0}
    scores = likelihood.scores(
        [ExpertWeights({"cold": weight}) for weight in (everywhere, 0.8, first)], [0, 1, 2], draw=0
    )
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert abs(scores[2] - scores[1]).max() > 1e-3


def test_wrong_arguments_are_told(model: SoupModel) -> None:
    with pytest.raises(UsageError, match="there are no examples"):
        TextLikelihood(model, [])
    with pytest.raises(UsageError, match="batch_size is 0"):
        TextLikelihood(model, EXAMPLES, batch_size=0)
    with pytest.raises(InputError, match="takes at most 256"):
        TextLikelihood(model, [Example(prompt="soap", text="0" * 256)])
    with pytest.raises(DeclarationError, match="no expert is called 'hot'"):
        TextLikelihood(model, EXAMPLES).scores([ExpertWeights({"hot": 1.0})], [0], draw=0)


def test_a_template_without_the_text_is_told(model: SoupModel) -> None:
    tokenizer: Any = model.tokenizer
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="does not render the text"):
        TextLikelihood(model, EXAMPLES)
