"""Bases whose files name tensors otherwise than the model in memory, or the adapter, does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups import ExpertLibrary, Profile, merge_into_base
from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.stored_names import StoredNames
from personalized_soups.errors import IncompatibleExpertsError
from tests import oracles
from tests.experts import write_adapter

Q = "layers.0.self_attn.q_proj"
WEIGHTS = "model.safetensors"


def write_expert(folder: Path, modules: tuple[str, ...], **config: Any) -> Path:
    """Write an expert of rank 2 for modules of 4 inputs and outputs."""
    tensors: dict[str, tuple[str, Any]] = {}
    for seed, module in enumerate(modules):
        random = np.random.default_rng(seed)
        for factor, shape in (("lora_A", (2, 4)), ("lora_B", (4, 2))):
            tensors[f"base_model.model.{module}.{factor}.weight"] = ("F32", random.normal(size=shape))
    shapes: dict[str, tuple[int, int]] = dict.fromkeys(modules, (4, 4))
    return write_adapter(folder, tensors, rank=2, shapes=shapes, **config)


def write_square(folder: Path, names: tuple[str, ...], model_type: str = "llama") -> Path:
    """Write a base of tensors of 4 x 4."""
    folder.mkdir()
    tensors = {name: ("F32", np.full((4, 4), float(place))) for place, name in enumerate(names)}
    oracles.write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}", "tie_word_embeddings": false}}')
    return folder


def folded(tmp_path: Path, base: Path) -> dict[str, oracles.Matrix]:
    library = ExpertLibrary.open(tmp_path / "experts")
    out = merge_into_base(library, Profile(weights=dict.fromkeys(library, 1.0)), base, tmp_path / "out")
    return oracles.read_tensors(out / WEIGHTS)


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        # parts of a model of its own code: neither is the base's module
        ((f"lm_q.{Q}", f"lm_p.{Q}"), rf"lm_p\.{Q}\.weight is not in the base.*lm_q\.{Q}\.weight is not in the base"),
        ((f"lm_q.{Q}",), rf"lm_q\.{Q}\.weight is not in the base"),
        # each of these may be the base's module, but not both
        (
            (f"model.{Q}", f"transformer.{Q}"),
            rf"model\.{Q}\.weight and transformer\.{Q}\.weight are two .* one in the base: {Q}\.weight",
        ),
        (
            (f"module.{Q}", Q),
            rf"{Q}\.weight and module\.{Q}\.weight are two .* one in the base: {Q}\.weight",
        ),
    ],
)
def test_two_modules_of_one_expert_on_one_tensor_are_refused(
    tmp_path: Path, modules: tuple[str, ...], says: str
) -> None:
    write_expert(tmp_path / "experts" / "one", modules)
    base = write_square(tmp_path / "base", (f"{Q}.weight",))
    with pytest.raises(IncompatibleExpertsError, match=says):
        folded(tmp_path, base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "stored"),
    [
        (f"model.{Q}", (f"model.{Q}.weight", f"{Q}.weight", f"module.model.{Q}.weight")),  # the name itself
        (f"transformer.{Q}", (f"{Q}.weight", "layers.1.self_attn.q_proj.weight")),
        (f"model.{Q}", (f"model.language_model.{Q}.weight", "model.visual.blocks.0.self_attn.q_proj.weight")),
        (f"model.language_model.{Q}", (f"model.{Q}.weight", "model.embed_tokens.weight")),
        (Q, (f"model.{Q}.weight", "lm_head.weight")),
        # a wrapper, where the base has no module of its name
        (f"module.model.{Q}", (f"model.{Q}.weight", "lm_head.weight")),
        ("model.layers.0.module.self_attn.q_proj", (f"model.{Q}.weight", "lm_head.weight")),
        (f"model.{Q}", (f"module.model.{Q}.weight", "module.lm_head.weight")),
        # a module that is really called so
        (f"module.{Q}", (f"module.{Q}.weight", f"{Q}.weight")),
        (f"model.module.{Q}", (f"model.module.{Q}.weight", f"model.{Q}.weight")),
    ],
)
def test_a_change_goes_to_the_tensor_of_its_name_and_to_no_other(
    tmp_path: Path, module: str, stored: tuple[str, ...]
) -> None:
    """The first of the base's tensors is the one; the product is that of NumPy in float64."""
    folder = write_expert(tmp_path / "experts" / "one", (module,))
    base = write_square(tmp_path / "base", stored)
    got, before = folded(tmp_path, base), oracles.read_tensors(base / WEIGHTS)
    (delta,) = oracles.deltas(folder).values()
    np.testing.assert_allclose(got[stored[0]], before[stored[0]] + delta, rtol=0, atol=1e-5)
    assert list(got) == list(before)
    for other in stored[1:]:
        np.testing.assert_array_equal(got[other], before[other])


@pytest.mark.parametrize(
    ("tensor", "stored"),
    [
        # the name may be that of the vision tower
        (f"{Q}.weight", (f"language_model.model.{Q}.weight", f"audio_tower.{Q}.weight")),
        (f"encoder.{Q}.weight", (f"text_model.encoder.{Q}.weight", f"vision_model.encoder.{Q}.weight")),
        # a head that the base lacks is not a router's, which ends alike
        ("score.weight", ("model.layers.0.mlp.gate.score.weight", "lm_head.weight")),
        ("model.norm.weight", ("model.visual.merger.norm.weight", "lm_head.weight")),
        # nothing is dropped but what is known to be a wrapper, or around the model proper
        (f"lm_q.{Q}.weight", (f"{Q}.weight",)),
        (f"talker.model.{Q}.weight", (f"thinker.model.{Q}.weight",)),
        (f"vision_model.{Q}.weight", (f"text_model.{Q}.weight",)),
        (f"encoder.{Q}.weight", (f"decoder.{Q}.weight",)),
        (f"{Q}_norm.weight", (f"{Q}.weight",)),
        ("q_proj.weight", (f"{Q}.weight", "layers.1.self_attn.q_proj.weight")),
        (f"model.{Q}.weight", (f"module.model.{Q}.weight", f"model.module.{Q}.weight")),
    ],
)
def test_nothing_is_found_where_a_name_does_not_decide(tensor: str, stored: tuple[str, ...]) -> None:
    assert StoredNames(stored, None, tuple).find(tensor) is None


def test_a_mismatch_shows_the_names_of_both(tmp_path: Path) -> None:
    write_expert(tmp_path / "experts" / "one", (Q,))
    base = write_square(tmp_path / "base", (f"language_model.model.{Q}.weight", f"audio_tower.{Q}.weight"))
    with pytest.raises(IncompatibleExpertsError) as caught:
        folded(tmp_path, base)
    assert f"{Q}.weight is not in the base" in caught.value.what
    assert f"audio_tower.{Q}.weight, language_model.model.{Q}.weight" in caught.value.what
    assert "save it again with the model class of the training" in caught.value.mend


def test_names_that_mean_another_tensor_in_memory_are_never_taken_as_they_are() -> None:
    """The files of kimi_k25 call fc0 what is fc1 in memory, and fc1 what is fc2 there."""
    block = "vision_tower.encoder.blocks.0.mlp"
    stored = [f"{block}.{name}.weight" for name in ("fc0", "fc1")]
    assert StoredNames(stored, "kimi_k25", tuple).find(f"{block}.fc1.weight") is None
    assert StoredNames(stored, "llama", tuple).find(f"{block}.fc1.weight") == f"{block}.fc1.weight"


ORDINARY = """
import sys
from personalized_soups import ExpertLibrary, Profile, merge_into_base
library = ExpertLibrary.open(sys.argv[1])
for base in sys.argv[2:]:
    merge_into_base(library, Profile(weights={"one": 1.0}), base, base + "-out")
print(sorted({"transformers", "peft"} & set(sys.modules)))
"""


def test_transformers_is_not_imported_where_the_names_decide(tmp_path: Path) -> None:
    write_expert(tmp_path / "experts" / "one", (f"model.{Q}",))
    stored = (f"model.{Q}.weight", f"{Q}.weight", f"model.language_model.{Q}.weight")
    bases = [write_square(tmp_path / str(n), (name, "model.embed_tokens.weight")) for n, name in enumerate(stored)]
    folders = [str(tmp_path / "experts"), *map(str, bases)]
    done = subprocess.run([sys.executable, "-c", ORDINARY, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert all((tmp_path / f"{n}-out" / WEIGHTS).exists() for n in range(len(stored)))


def test_a_tied_models_output_embedding_needs_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_square(tmp_path / "base", ("model.embed_tokens.weight",))
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    model = BaseModel.open(base)
    monkeypatch.setattr(StoredNames, "_renamings", property(lambda _: pytest.fail("looked at transformers' tables")))
    for name in ("lm_head.weight", "model.lm_head.weight", "module.lm_head.weight"):
        assert model.find(name) is None
        assert model.source(name) == "model.embed_tokens.weight"
        assert model.written_name(name) == "lm_head.weight"
