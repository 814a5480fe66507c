"""No prompt has two uses: training, choosing and testing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalized_soups.declare.loader import load
from personalized_soups.declare.run_recipe import RunRecipe
from personalized_soups.errors import DeclarationError
from personalized_soups.studies.pipeline.held_out import check_held_out


def declared(folder: Path, **prompts: str) -> RunRecipe:
    """Return a recipe whose steps have these prompts."""
    for name, text in prompts.items():
        (folder / f"{name}.txt").write_text(text)
    steps = {
        "pool": {"kind": "rollouts", "prompts": "pool.txt"},
        "policy": {"kind": "train", "method": "grpo", "prompts": "pool.txt", "recipe": "r.yaml"},
        "chosen": {"kind": "choose", "prompts": "chosen.txt", "experts": "policy", "weights": {"linear": [1.0]}},
        "base": {"kind": "answers", "prompts": "test.txt", "num_prompts": 2},
        "sweep": {"kind": "sweep", "prompts": "test.txt", "num_prompts": 2, "experts": "policy", "weight": 1.0},
    }
    (folder / "run.yaml").write_text(json.dumps({"base": "tiny", "steps": steps}, indent=1))
    return load(folder / "run.yaml", RunRecipe)


def test_steps_with_the_same_use_share_prompts(tmp_path: Path) -> None:
    # the third test prompt is not used
    check_held_out(declared(tmp_path, pool="a\nb\n", chosen="c\n", test="d\ne\na\n"))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            {"pool": "a\nb\n", "chosen": "c\n", "test": "d\nb\n"},
            "'pool' and 'base' share the prompt 'b', but one is for training and the other for testing",
        ),
        (
            {"pool": "a\nb\n", "chosen": "a\n", "test": "d\ne\n"},
            "'pool' and 'chosen' share the prompt 'a', but one is for training and the other for choosing",
        ),
        (
            {"pool": "a\n", "chosen": "c\n", "test": "d\nc\n"},
            "'chosen' and 'base' share the prompt 'c', but one is for choosing and the other for testing",
        ),
    ],
)
def test_a_prompt_with_two_uses_is_rejected(prompts: dict[str, str], message: str, *, tmp_path: Path) -> None:
    with pytest.raises(DeclarationError) as caught:
        check_held_out(declared(tmp_path, **prompts))
    assert message in str(caught.value)
    assert "run.yaml:" in str(caught.value)
