"""The adapter that is trained together with the base rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from personalized_soups.errors import UsageError
from personalized_soups.generation.loading import load_base, load_tokenizer
from personalized_soups.generation.quiet import quiet_transformers
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.hidden_states import HiddenStates
from personalized_soups.systems.basis.adapting import AdaptSettings, train_adapted
from personalized_soups.systems.basis.data import TextComparisons
from personalized_soups.systems.pref.training import PrefSettings, train_pref


def data() -> TextComparisons:
    """Four users compare ten answers: two prefer one random order, two the opposite order."""
    items = tuple(
        TextItem("wash", f"rub the {place} kettle {number}") for number in range(5) for place in ("old", "nice")
    )
    order = np.random.default_rng(0).permutation(len(items))
    a, b = np.triu_indices(len(items), 1)
    users, pair = np.divmod(np.arange(4 * len(a)), len(a))
    labels = (order[a[pair]] > order[b[pair]]) == (users % 2 == 0)
    return TextComparisons(
        items, tuple(a[pair]), tuple(b[pair]), tuple(labels.astype(float)), tuple(users), num_users=4
    )


def adapted(base: Path) -> tuple[Any, HiddenStates]:
    torch.manual_seed(0)
    model = load_base(base, device=torch.device("cpu"))
    with quiet_transformers():
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return peft_model, HiddenStates(peft_model, load_tokenizer(base), base=base)


def test_the_adapter_improves_the_likelihood_and_the_base_stays(small_base: Path) -> None:
    model, states = adapted(small_base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings, digest = PrefSettings(rank=1), states.digest
    frozen = train_pref(data().comparisons(states), settings)
    trained = train_adapted(data(), states, settings, AdaptSettings(epochs=6, adapter_rate=1e-2))
    assert trained.losses[-1] < 0.8 * frozen.losses[-1]
    assert states.digest != digest
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_model_without_an_adapter_is_refused(small_base: Path) -> None:
    model = load_base(small_base, device=torch.device("cpu")).requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter"):
        train_adapted(data(), HiddenStates(model, load_tokenizer(small_base), base=small_base))
    with pytest.raises(UsageError, match="fixed_first"):
        train_adapted(data(), adapted(small_base)[1], PrefSettings(rank=2, fixed_first=True))
    with pytest.raises(ValueError, match="at least 1"):
        AdaptSettings(epochs=0)
