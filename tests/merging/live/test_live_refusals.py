"""The profiles, experts and models that a live soup rejects."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest

from personalized_soups import ExpertLibrary, LiveAdapter, Profile
from personalized_soups.errors import (
    DeclarationError,
    IncompatibleExpertsError,
    InputError,
    SoupError,
    UnsupportedAdapterError,
    UsageError,
)
from tests import oracles
from tests.experts import write_expert
from tests.merging.live.live_soups import (
    KINDS,
    MODULE,
    base_model,
    factors,
    live_of,
    profile_of,
    state,
    write_experts,
)

# PEFT still uses transformers' old name; no code here can change that
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize(
    ("profile", "kind", "message"),
    [
        (Profile(weights={"fuor": 1, "one": 1}), "free", "no expert is called 'fuor'.*choose from: one, three"),
        (
            profile_of((1, 1, 1), method="factor_linear"),
            "free",
            "asks for the method factor_linear.*method='factor_linear'",
        ),
        (profile_of((1, 1, 1), rank=9), "free", "rank 9; the live soup is exact and has rank 10.*leave `rank` out"),
        (profile_of((1, 1, -2)), "average", "divides by the sum of the weights, which is 0.*use the method"),
        (profile_of((1e30, 1e10, 0)), "free", "beyond float32.*smaller weights"),
        (profile_of((-1e30, 1e10, 0)), "shared", "beyond float32.*smaller weights"),
    ],
)
def test_a_rejected_profile_changes_nothing(
    tmp_path: Path, small_base: Path, profile: Profile, kind: str, message: str
) -> None:
    experts, settings = KINDS[kind]
    live = LiveAdapter(write_experts(tmp_path, **{**experts, "alpha": 1e12}), **settings)
    model = live.attach(base_model(small_base))
    live.set(profile_of((0.5, 0.25, 1.0)))
    before, now = state(model), live.profile
    with pytest.raises(SoupError, match=f"(?s){message}"):
        live.set(profile)
    assert state(model) == before
    assert live.profile is now


def test_a_float16_soup_rejects_values_beyond_float16(tmp_path: Path) -> None:
    live = LiveAdapter(write_experts(tmp_path / "experts"), dtype="float16")
    with pytest.raises(UsageError, match="beyond float16"):
        live.set(profile_of((1e6, 1, 1)))
    live.set(profile_of((1e3, 1, 1)))
    with pytest.raises(UsageError, match="the dtype 'int8' is unknown"):
        LiveAdapter(write_experts(tmp_path / "again"), dtype="int8")


def test_opposed_sides_are_rejected_unless_allowed(tmp_path: Path) -> None:
    for index, name in enumerate(("friendly", "unfriendly")):
        write_expert(tmp_path / name, seed=index)
    live = LiveAdapter(ExpertLibrary.open(tmp_path))
    with pytest.raises(DeclarationError, match="two sides of one dimension"):
        live.set(Profile(weights={"friendly": 1, "unfriendly": 1}))
    live.set(Profile(weights={"friendly": 1, "unfriendly": 1}, allow_opposed=True))
    live.set(Profile(weights={"friendly": 1, "unfriendly": 0}))


def test_a_live_soup_of_some_experts_of_a_library(tmp_path: Path, small_base: Path) -> None:
    library = write_experts(tmp_path)
    live = LiveAdapter(library, experts=["two", "one"])
    assert live.rank == 8
    model = live.attach(base_model(small_base))
    live.set(Profile(weights={"two": 3, "one": 1, "three": 0}, normalize="sum"))
    want = oracles.soup([library["two"].folder, library["one"].folder], [0.75, 0.25])
    for module, (a, b) in factors(model).items():
        assert oracles.relative_error(b @ a, want[module]) < 1e-6
    with pytest.raises(DeclarationError, match="the live soup was created without the expert 'three'"):
        live.set(profile_of((1, 1, 1)))
    with pytest.raises(UsageError, match="a live soup needs at least one expert"):
        LiveAdapter(library, experts=[])
    with pytest.raises(DeclarationError, match="no expert is called 'four'"):
        LiveAdapter(library, experts=["four"])


def test_a_model_that_was_moved_or_cast_is_an_error(tmp_path: Path, small_base: Path) -> None:
    _, live = live_of("free", tmp_path / "experts", "cpu")
    model = live.attach(base_model(small_base))
    model.to("cpu").float()  # nothing changes
    live.set(profile_of((1, 1, 1)))
    model.double()
    with pytest.raises(UsageError, match="moved or cast after"):
        live.set(profile_of((1, 1, 1)))
    with pytest.raises(UsageError, match="moved or cast after"):
        live.zero()
    model.delete_adapter("soup")
    live.set(profile_of((1, 1, 1)))


def test_a_model_that_does_not_fit_is_rejected(tmp_path: Path, small_base: Path) -> None:
    for name, shapes in {
        "missing": {"model.layers.7.mlp.up_proj": (96, 64)},
        "shape": {MODULE: (96, 32)},
        "kind": {"model.embed_tokens": (64, 320)},
    }.items():
        write_expert(tmp_path / name, shapes=shapes)
    library = ExpertLibrary.open(tmp_path)
    for name, what in {
        "missing": "model.layers.7.mlp.up_proj is missing",
        "shape": rf"{MODULE} has the shape \[96, 64\]; .* of shape \[96, 32\]",
        "kind": "model.embed_tokens is of type Embedding",
    }.items():
        with pytest.raises(IncompatibleExpertsError, match=what):
            LiveAdapter(library, experts=[name]).attach(base_model(small_base))
    write_expert(tmp_path / "fits")
    live = LiveAdapter(ExpertLibrary.open(tmp_path / "fits"))
    with pytest.raises(UsageError, match="is on meta, but the live soup is on cpu"):
        live.attach(base_model(small_base).to("meta"))


def test_methods_that_are_not_sums_of_factors_are_rejected(tmp_path: Path) -> None:
    library = write_experts(tmp_path / "experts", rank=(2, 5, 3))
    with pytest.raises(UsageError, match="unknown merge method 'lineer'"):
        LiveAdapter(library, method="lineer")
    with pytest.raises(UsageError, match="a live soup cannot be computed by ties") as caught:
        LiveAdapter(library, method="ties")
    assert "factor_average" in caught.value.mend
    with pytest.raises(IncompatibleExpertsError, match="needs one rank for all experts"):
        LiveAdapter(library, method="factor_linear")
    with pytest.raises(UsageError, match="no device 'cuda:99'"):
        LiveAdapter(library, device="cuda:99")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"modules_to_save": ["lm_head"]}, "trained whole (modules_to_save)"),
        ({"use_dora": True}, "trained whole (use_dora)"),
        ({"target_modules": ["embed_tokens"]}, "adapts model.embed_tokens, which is a module of the kind embedding"),
    ],
)
def test_anything_but_linear_layers_is_rejected_by_name(
    tmp_path: Path, small_base: Path, options: dict[str, Any], what: str
) -> None:
    config = peft.LoraConfig(**{"target_modules": ["up_proj"], "task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(base_model(small_base), config)
    model.save_pretrained(str(tmp_path / "odd"), save_embedding_layers=False)
    with pytest.raises(UnsupportedAdapterError, match=re.escape(what)) as caught:
        LiveAdapter(ExpertLibrary.open(tmp_path))
    assert "expert 'odd'" in caught.value.what


def test_an_expert_with_nan_is_rejected(tmp_path: Path) -> None:
    library = write_experts(tmp_path)
    path = tmp_path / "two" / "adapter_model.safetensors"
    tensors = {name: ("F32", values) for name, values in oracles.read_tensors(path).items()}
    tensors[f"base_model.model.{MODULE}.lora_B.weight"][1][3, 1] = np.nan
    oracles.write_tensors(path, tensors)
    with pytest.raises(InputError, match=rf"{MODULE}.*nan"):
        LiveAdapter(library)
