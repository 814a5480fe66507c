"""Log-probabilities of one-token answers against PEFT in float64: one prompt at a time, without a shared beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from personalized_soups import SoupModel
from personalized_soups.errors import InputError, UsageError
from personalized_soups.scoring.choices import choice_log_probs
from tests.mixing.worlds import LOGITS, write_experts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PROMPTS = [
    "How do I wash the kettle?",
    "How do I wash the old kettle so that it looks nice again?",
    "wash",
    "How do I rub it?",
]
CHOICES = ["w", "r", "!"]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return write_experts(tmp_path / "experts", base="base")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest, folders: list[Path], small_base: Path) -> SoupModel:
    return SoupModel.from_pretrained(small_base, folders[0].parent, device=request.param)


def true_log_probs(base: Path, adapter: Path | None, ids: list[int], choices: list[int]) -> np.ndarray[Any, Any]:
    """The log-probabilities of the next token, from one unpadded forward pass in float64."""
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    loaded = plain if adapter is None else PeftModel.from_pretrained(plain, str(adapter)).double()
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
    total = logits.max() + np.log(np.exp(logits - logits.max()).sum())
    return np.array([logits[choice] - total for choice in choices])


@pytest.mark.parametrize("which", [None, 0])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_figures_are_those_of_a_single_unpadded_pass(
    model: SoupModel, folders: list[Path], small_base: Path, which: int | None, batch_size: int
) -> None:
    adapter = None if which is None else folders[which]
    profile = None if adapter is None else {adapter.name: 1.0}
    table = choice_log_probs(model, PROMPTS, CHOICES, profile, batch_size=batch_size)
    tokens = [model.generator.tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in CHOICES]
    for row, prompt in zip(table, PROMPTS, strict=True):
        expected = true_log_probs(small_base, adapter, model.generator.encoded(prompt), tokens)
        # a log-probability is a difference of two values that each have the error of a logit
        np.testing.assert_allclose(row, expected, rtol=0, atol=2 * LOGITS)


def test_a_prompt_alone_and_equal_prompts_have_no_suffix_of_their_own(model: SoupModel) -> None:
    alone = choice_log_probs(model, PROMPTS[:1], CHOICES)
    twice = choice_log_probs(model, [PROMPTS[0], PROMPTS[0]], CHOICES)
    np.testing.assert_allclose(twice, np.concatenate([alone, alone]), rtol=0, atol=2 * LOGITS)


def test_no_prompts_give_an_empty_table(model: SoupModel) -> None:
    assert choice_log_probs(model, [], CHOICES).shape == (0, 3)


def test_progress_ends_with_the_number_of_prompts(model: SoupModel) -> None:
    seen: list[int] = []
    choice_log_probs(model, PROMPTS, CHOICES, batch_size=3, on_done=seen.append)
    assert seen == [3, 4]


def test_a_choice_of_several_tokens_is_rejected(model: SoupModel) -> None:
    with pytest.raises(InputError, match="must be one token"):
        choice_log_probs(model, PROMPTS, ["kettle and pot"])


@pytest.mark.parametrize(("choices", "batch_size"), [([], 64), (["w"], 0)])
def test_no_choices_and_no_rows_are_rejected(model: SoupModel, choices: list[str], batch_size: int) -> None:
    with pytest.raises(UsageError):
        choice_log_probs(model, PROMPTS, choices, batch_size=batch_size)
