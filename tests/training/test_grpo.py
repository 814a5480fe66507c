"""Training by RL: the reward rises, checkpoints resume exactly, and rewards are those of the plain prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from personalized_soups import TINY_BASE
from personalized_soups.adapters.provenance import read_expert_record
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.declare.training import GrpoRecipe
from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.generation.generator import Generator
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.reward_models import RewardModels
from personalized_soups.studies.prompt_sources import TinyPrompts
from personalized_soups.training.grpo import train_policy
from personalized_soups.training.policy_reward import PolicyReward
from tests.training.heard import Heard
from tests.training.test_reward import train as train_reward

CATALOGUE = Catalogue.model_validate_json(
    """{"dimensions": {"informativeness": {"about": "length", "scorer": {"kind": "length", "low": 0, "high": 30},
        "sides": {"concise": {"label": "P2A", "instruction": "Be brief.", "end": "low"},
                  "informative": {"label": "P2B", "instruction": "Tell all."}}},
        "water": {"about": "water", "scorer": {"kind": "markers", "high": ["water"], "low": ["soap"]},
        "sides": {"wet": {"instruction": "Speak of water."}, "dry": {"instruction": "Do not.", "end": "low"}}}}}"""
)
RECIPE = GrpoRecipe.model_validate_json(
    """{
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "grpo": {"beta": 0.02, "num_generations": 4, "max_new_tokens": 12},
    "optimizer": {"learning_rate": 0.02, "warmup_steps": 1, "max_steps": 6, "batch_size": 8},
    "save_steps": 2
}"""
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"how to wash the {thing}?\n" for thing in ("kettle", "towel", "soap", "water")))
    return path


def train(base: Path, prompts: Path, out: Path, name: str = "concise", **options: Any) -> Path:
    given: dict[str, Any] = {"recipe": RECIPE, "catalogue": CATALOGUE, "device": "cpu"} | options
    return train_policy(name, base=base, prompts=prompts, out=out, **given)


@pytest.mark.slow
def test_a_policy_learns_what_is_rewarded(tmp_path: Path) -> None:
    """The embedded base answers new questions more briefly after 16 steps than before, by more than chance explains."""
    catalogue = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
    shipped = load(shipped_recipe("train/grpo-tiny.yaml"), GrpoRecipe)
    optimizer = shipped.optimizer.replaced(max_steps=16, batch_size=32, learning_rate=4e-3)
    world = TinyPrompts()
    (tmp_path / "prompts.txt").write_text("\n".join(world.draw("train", 64, 0)) + "\n")
    heard = Heard()
    out = train(
        TINY_BASE, tmp_path / "prompts.txt", tmp_path / "e",
        recipe=shipped.replaced(optimizer=optimizer), catalogue=catalogue, progress=heard,
    )  # fmt: skip
    assert [report.step for report in heard.reports] == list(range(1, 17))
    assert heard.reports[0].figures["kl"] == pytest.approx(0.0, abs=1e-6)  # the policy begins as the base
    assert heard.reports[-1].figures["kl"] > 0
    asked = world.draw("test", 64, 0)
    reward = PolicyReward.of({"concise": 1.0}, catalogue)
    scores = []
    for adapter in (None, out):
        generator = Generator.open(TINY_BASE, adapter, device="cpu")
        answers = [text for (text,) in generator.answers(asked, max_new_tokens=96, temperature=1.0, seed=5)]
        scores.append(reward.of_answers([TextItem(*each) for each in zip(asked, answers, strict=True)]))
    gains = scores[1] - scores[0]
    assert gains.mean() > 3 * gains.std() / len(gains) ** 0.5
    record = read_expert_record(out)
    assert record is not None
    assert (record.method, record.side, record.dimension) == ("grpo", "concise", "informativeness")
    assert record.recipe["rewards"] == {"concise": 1.0}


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_bytes(small_base: Path, prompts: Path, tmp_path: Path) -> None:
    whole = train(small_base, prompts, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(small_base, prompts, tmp_path / "cut", progress=Heard(stop_at=3))
    heard = Heard()
    cut = train(small_base, prompts, tmp_path / "cut", resume=True, progress=heard)
    assert [report.step for report in heard.reports] == [3, 4, 5, 6]  # from the checkpoint of step 2
    for name in ("adapter_model.safetensors", "adapter_config.json", "expert.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_the_reward_is_that_of_the_plain_prompt(
    small_base: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TextItem] = []
    of_answers = PolicyReward.of_answers

    def heard(self: PolicyReward, items: Any) -> Any:
        seen.extend(items)
        return of_answers(self, items)

    monkeypatch.setattr(PolicyReward, "of_answers", heard)
    recipe = RECIPE.replaced(optimizer=RECIPE.optimizer.replaced(max_steps=1, warmup_steps=0))
    train(small_base, prompts, tmp_path / "e", recipe=recipe, instruction="Be brief.")
    assert len(seen) == 8
    assert {item.prompt for item in seen} <= set(prompts.read_text().splitlines())
    groups = [[item.prompt for item in seen[start : start + 4]] for start in (0, 4)]
    assert all(len(set(group)) == 1 for group in groups)  # a group answers one prompt
    assert all(item.answer == item.answer.strip() for item in seen)


def test_a_reward_is_a_weighted_sum_of_scores_and_models(small_base: Path, pairs_file: Path, tmp_path: Path) -> None:
    folder = train_reward(small_base, pairs_file, tmp_path / "short")
    items = [TextItem("wash it", "water and water"), TextItem("wash it", "soap")]
    model = RewardModels({"short": folder}, device="cpu").features(items)[:, 0]
    weights = {"concise": 0.5, "dry": -2.0, "short": 0.25}
    reward = PolicyReward.of(weights, CATALOGUE, models={"short": folder}, device="cpu")
    expected = [0.5 * (1 - 3 / 30) - 2.0 * 0.0 + 0.25 * model[0], 0.5 * (1 - 1 / 30) - 2.0 * 1.0 + 0.25 * model[1]]
    assert reward.of_answers(items).tolist() == pytest.approx(expected)


def test_unknown_rewards_and_batches_without_whole_groups_are_rejected(small_base: Path, tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="neither a side") as caught:
        PolicyReward.of({"concice": 1.0}, CATALOGUE)
    assert "did you mean 'concise'?" in caught.value.mend
    with pytest.raises(ValueError, match="at least one weight"):
        PolicyReward.of({}, CATALOGUE)
    few = tmp_path / "few.txt"
    few.write_text("how to wash it?\n")
    with pytest.raises(InputError, match="there are 1 prompts, but each step takes 2"):
        train(small_base, few, tmp_path / "e")
    wrong = json.loads(RECIPE.model_dump_json())
    wrong["optimizer"]["batch_size"] = 6
    with pytest.raises(ValueError, match="does not hold whole groups of 4"):
        GrpoRecipe.model_validate_json(json.dumps(wrong))
