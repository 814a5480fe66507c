"""What experts do to each other's pairs: margins against PEFT in float64, and the warning about a harmed side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from personalized_soups import SoupModel
from personalized_soups.errors import InputError, UsageError
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.scoring.margin_forecast import MarginForecast
from personalized_soups.training.interference import Interference
from tests.mixing.worlds import LOGITS, write_experts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PAIRS = [
    ("How do I wash the kettle?", "Wash it with warm water.", "No."),
    ("wash", "rub", "Rub it dry, then polish it."),
    ("How do I rub it?", "With a towel.", "With soap."),
]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return write_experts(tmp_path / "experts", base="base")


@pytest.fixture
def model(folders: list[Path], small_base: Path) -> SoupModel:
    return SoupModel.from_pretrained(small_base, folders[0].parent, device="cpu")


def write_pairs(path: Path, pairs: list[tuple[str, str, str]] = PAIRS) -> Path:
    """Write conversations, as `psoups pairs` does for a base with a chat template."""
    lines = []
    for prompt, chosen, rejected in pairs:
        said = {"prompt": ("user", prompt), "chosen": ("assistant", chosen), "rejected": ("assistant", rejected)}
        lines.append(json.dumps({key: [{"role": role, "content": text}] for key, (role, text) in said.items()}))
    path.write_text("\n".join(lines) + "\n")
    return path


def log_prob(model: Any, base: Path, prompt: str, answer: str) -> float:
    """The log-probability of an answer with its end token, by the fixture's template, from one float64 pass."""
    tokenizer = load_tokenizer(base)
    before = tokenizer(f"<|user|>{prompt}<|assistant|>", add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{answer}<|eos|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*before, *after]])).logits[0].double()
    chosen = logits.log_softmax(-1)[len(before) - 1 : -1].gather(1, torch.tensor(after)[:, None])
    return float(chosen.sum())


def test_changes_are_those_of_each_expert_alone(
    model: SoupModel, folders: list[Path], small_base: Path, tmp_path: Path
) -> None:
    file = write_pairs(tmp_path / "warm.jsonl")
    measured = Interference.measure(model, {"warm": file}).forecasts["warm"]
    plain: Any = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float64)
    base = [
        log_prob(plain, small_base, prompt, one) - log_prob(plain, small_base, prompt, two)
        for prompt, one, two in PAIRS
    ]
    for folder in folders:
        fresh: Any = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float64)
        adapted = PeftModel.from_pretrained(fresh, str(folder)).double()
        expected = [
            log_prob(adapted, small_base, prompt, one) - log_prob(adapted, small_base, prompt, two) - before
            for (prompt, one, two), before in zip(PAIRS, base, strict=True)
        ]
        column = measured.changes[:, measured.names.index(folder.name)]
        # encode_pairs sorts pairs by length; an answer of up to 30 tokens has that many errors of a log-probability,
        # and a change is a difference of four answers
        np.testing.assert_allclose(sorted(column), sorted(expected), rtol=0, atol=4 * 30 * 2 * LOGITS)


def test_a_soup_that_undoes_an_expert_is_a_warning() -> None:
    changes = np.array([[2.0, -3.0], [1.0, -0.5], [1.0, -2.0], [2.0, -4.0]])
    found = Interference({"keen": MarginForecast(("keen", "calm"), np.zeros(4), changes)})
    (forecast,) = found.soup({"keen": 1.0, "calm": 1.0})
    assert (forecast.alone, forecast.soup, forecast.num_pairs) == (1.0, 0.25, 4)
    assert forecast.changes == {"keen": 1.5, "calm": -2.375}
    (finding,) = found.findings({"keen": 1.0, "calm": 1.0})
    assert finding.severity == "warning"
    assert finding.kind == "interference"
    assert "25% of the pairs for keen" in finding.what
    assert "calm (-2.38)" in finding.what


def test_a_soup_in_which_the_expert_prevails_is_no_finding() -> None:
    changes = np.array([[2.0, -3.0], [1.0, -0.5]])
    found = Interference({"keen": MarginForecast(("keen", "calm"), np.zeros(2), changes)})
    assert found.findings({"keen": 1.0, "calm": 0.1}) == []
    assert found.soup({"calm": 1.0}) == []  # the soup has no weight for the side


def test_pairs_are_drawn_with_a_seed(model: SoupModel, tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "warm.jsonl")
    first, again = (Interference.measure(model, {"warm": file}, num_pairs=2).forecasts["warm"] for _ in range(2))
    assert first.changes.shape == (2, 3)
    np.testing.assert_array_equal(first.changes, again.changes)


def test_an_unknown_side_and_pairs_without_a_difference_are_rejected(model: SoupModel, tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "warm.jsonl")
    with pytest.raises(UsageError, match="no expert is called 'warmer'"):
        Interference.measure(model, {"warmer": file})
    with pytest.raises(UsageError, match="num_pairs is 0"):
        Interference.measure(model, {"warm": file}, num_pairs=0)
    with pytest.raises(InputError, match="equal"):
        Interference.measure(model, {"warm": write_pairs(tmp_path / "same.jsonl", [("wash", "rub", "rub")])})
