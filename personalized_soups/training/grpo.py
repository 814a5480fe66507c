"""Train an adapter by RL on rewards of its own answers: GRPO (Shao et al. 2024, arXiv:2402.03300).

It takes the place of the PPO of Personalized Soups (arXiv:2310.11564): the same rewards and the same KL divergence to
the base, without a model of values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from personalized_soups.adapters.base_adapter import open_on
from personalized_soups.adapters.provenance import BaseRecord, DataRecord, ExpertRecord, library_versions
from personalized_soups.bases.place import place_of
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.training import GrpoRecipe
from personalized_soups.devices import resolve_device
from personalized_soups.errors import InputError
from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from personalized_soups.generation.loading import load_base, load_tokenizer
from personalized_soups.generation.prompts import read_prompts, with_text_before
from personalized_soups.training.policy_reward import PolicyReward
from personalized_soups.training.progress import Silent, TrainingProgress
from personalized_soups.training.run import Training, run_training


def train_policy(
    name: str,
    *,
    base: str | Path,
    prompts: Path,
    out: Path,
    recipe: GrpoRecipe,
    catalogue: Catalogue,
    rewards: Mapping[str, float] | None = None,
    reward_models: Mapping[str, Path | str] | None = None,
    instruction: str = "",
    on: str | Path | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    progress: TrainingProgress | None = None,
) -> Path:
    """Train an adapter by GRPO on a frozen base, and return its folder, which is that of an expert.

    Args:
        name: the side whose expert is trained, or with `rewards` any name of a policy.
        base: the base model: the name of a named base, a folder, a GGUF file or a hub id.
        prompts: a file of prompts: one on each line, or JSON Lines with the key `prompt`.
        out: the folder to write: adapter_config.json, adapter_model.safetensors, expert.json.
        recipe: the hyperparameters. `recipe.sides` may override some of them for this name.
        catalogue: declares the sides and their scorers.
        rewards: the weight of each reward. By default, the scorer of the side `name` alone.
        reward_models: the folder or hub id of reward models, by names in `rewards`, in place of scorers.
        instruction: a text before each prompt, such as the wanted preferences. Rewards are of the plain prompt.
        on, device, resume, progress: as for `train_expert`.
        seed: random seed for LoRA's initial A, the order of the prompts and the sampling of answers.

    Raises:
        SoupError: in the same cases as `train_expert`, and if a reward is unknown.

    Example:
        >>> folder = train_policy(  # doctest: +SKIP
        ...     "friendly",
        ...     base=TINY_BASE,
        ...     prompts=Path("prompts.txt"),
        ...     out=Path("experts/friendly"),
        ...     recipe=load(shipped_recipe("train/grpo-tiny.yaml"), GrpoRecipe),
        ...     catalogue=load(shipped_recipe("dimensions/tiny.yaml"), Catalogue),
        ... )
    """
    base = place_of(base)
    recipe = recipe.for_side(name)
    weights = dict(rewards or {name: 1.0})
    texts = read_prompts(prompts)
    base_adapter = open_on(on)
    declared = {"rewards": weights, "reward_models": sorted(map(str, (reward_models or {}).values()))}
    record = ExpertRecord(
        side=name,
        dimension=catalogue.dimension_of(name),
        base=BaseRecord(name=str(base), fingerprint=None),
        on=None if base_adapter is None else base_adapter.record,
        method="grpo",
        recipe={**recipe.model_dump(mode="json", exclude={"sides"}), **declared, "instruction": instruction},
        basis=recipe.basis,
        data=DataRecord(name=prompts.name, blake3=digest_file(prompts), num_pairs=len(texts)),
        seed=seed,
        versions=library_versions("torch", "transformers", "peft", "trl"),
        files=(CONFIG_FILE, WEIGHTS_FILE),
    )
    training = GrpoTraining(
        name=name,
        base=base,
        out=out,
        recipe=recipe,
        record=record,
        on=base_adapter,
        prompts=tuple(texts),
        reward=PolicyReward.of(weights, catalogue, models=reward_models, device=device),
        instruction=instruction,
    )
    return run_training(training, device=device, resume=resume, progress=progress or Silent())


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoTraining(Training):
    """A training by GRPO.

    Attributes:
        recipe: the recipe, with the overrides of the side.
        prompts: the prompts.
        reward: the reward of an answer.
        instruction: a text before each prompt. It may be empty.
    """

    recipe: GrpoRecipe
    prompts: tuple[str, ...]
    reward: PolicyReward
    instruction: str = ""

    logged: ClassVar[Mapping[str, str]] = MappingProxyType({"reward": "reward", "kl": "kl"})

    def build(self, *, partial: Path, device: str, progress: TrainingProgress) -> tuple[Any, dict[str, Any]]:
        """Return TRL's trainer. A resumed training shares all facts through the record."""
        import torch

        from personalized_soups.generation.special_tokens import num_embeddings, pad_id
        from personalized_soups.training.grpo_trainer import PolicyTrainer, grpo_config, prompts_per_step

        chosen = resolve_device(device)
        tokenizer = load_tokenizer(self.base)
        model = load_base(self.base, device=torch.device("cpu"), dtype=self.recipe.dtype, on=self.on)
        pad = pad_id(tokenizer, num_embeddings(model))
        if pad != tokenizer.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        config = grpo_config(
            self.recipe, partial=partial, device=chosen, model_dtype=model.dtype, seed=self.record.seed or 0
        )
        self._check_prompts(prompts_per_step(config))
        trainer = PolicyTrainer(
            self.recipe,
            model=model,
            tokenizer=tokenizer,
            prompts=self.prompts,
            asked=[str(with_text_before(prompt, self.instruction)) for prompt in self.prompts],
            reward=self.reward,
            config=config,
        )
        return trainer, {}

    def _check_prompts(self, per_step: int) -> None:
        if len(self.prompts) < per_step:
            raise InputError(
                f"there are {len(self.prompts)} prompts, but each step takes {per_step}",
                where=self.record.data.name if self.record.data else self.name,
                mend="give more prompts, or a smaller optimizer.batch_size: it is the number of answers, and "
                f"{self.recipe.grpo.num_generations} of them answer one prompt",
            )
