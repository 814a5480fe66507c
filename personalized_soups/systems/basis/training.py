"""Learn a basis from comparisons of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from personalized_soups.errors import UsageError
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.hidden_states import HiddenStates
from personalized_soups.scoring.item_features import ItemFeatures
from personalized_soups.systems.basis.basis import Basis, Kind
from personalized_soups.systems.basis.data import TextComparisons
from personalized_soups.systems.lore.training import LoreSettings, train_lore
from personalized_soups.systems.pref.training import PrefSettings, train_pref


def train_text_basis(
    data: TextComparisons,
    features: ItemFeatures[TextItem],
    *,
    kind: Kind = "pref",
    rank: int = 5,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Basis[TextItem]:
    """Learn base rewards that are linear in frozen features of answers.

    Args:
        data: the comparisons.
        features: makes the features, such as the hidden states of a base.
        kind: `pref` or `lore`.
        rank: the number of base rewards. LoRe drops those that no user uses.
        seed: the random seed of LoRe's start. PReF starts at an SVD.
        about: how the features are made, for the record.
        device: where the fit is computed.

    Raises:
        UsageError: if there are fewer than two users, or all users have the same taste.
    """
    if data.num_users < 2:
        raise UsageError(
            "the comparisons are of one user, but base rewards are learned from several",
            where="data",
            mend="give the comparisons of at least 2 users; about 50 users give a usable basis",
        )
    comparisons = data.comparisons(features)
    if kind == "lore":
        model: Any = train_lore(comparisons, LoreSettings(rank=rank, seed=seed), device=device)
    else:
        model = train_pref(comparisons, PrefSettings(rank=rank, seed=seed), device=device)
    return Basis(model, features, about or {}, len(comparisons))


def about_states(states: HiddenStates, base: str) -> dict[str, Any]:
    """Return how hidden states are made, for the record of a basis."""
    return {"kind": "hidden states", "base": base, "fingerprint": states.base_fingerprint, "pooling": states.pooling}
