from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups.adapters.compatible import disagreements
from personalized_soups.adapters.library import Expert
from tests.experts import SHAPES, write_adapter, write_expert, write_record


def expert(folder: Path, *, fingerprint: str | None = None, **options: Any) -> Expert:
    write_expert(folder, **options)
    if fingerprint is not None:
        write_record(folder, base={"name": options.get("base"), "fingerprint": fingerprint})
    return Expert(folder.name, folder)


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ({"base": "x"}, {"base": "x"}, True),
        ({"base": "x"}, {"base": "x/"}, True),
        ({"base": "x"}, {"base": "y"}, False),
        ({"base": "x"}, {"base": None}, False),
        ({"base": None}, {"base": None}, True),
        ({"base": "x", "fingerprint": "1"}, {"base": "y", "fingerprint": "1"}, True),
        ({"base": "x", "fingerprint": "1"}, {"base": "x", "fingerprint": "2"}, False),
        ({"base": "x", "fingerprint": "1"}, {"base": "x"}, True),
        ({"base": "x", "revision": "v1"}, {"base": "x", "revision": "v2"}, False),
        ({"base": "x", "revision": "main"}, {"base": "x", "revision": None}, True),
    ],
)
def test_bases_are_told_apart_by_fingerprint_then_by_name(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any], agree: bool
) -> None:
    experts = [expert(tmp_path / "one", **one), expert(tmp_path / "other", **other)]
    assert (not disagreements(experts)) == agree
    assert not disagreements(experts, same_base=True)


def test_two_spellings_of_one_folder_are_one_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    names = [str(tmp_path / "base"), str(tmp_path / "x" / ".." / "base")]
    (tmp_path / "x").mkdir()
    assert not disagreements([expert(tmp_path / str(index), base=name) for index, name in enumerate(names)])


def test_every_disagreement_is_told_at_once(tmp_path: Path) -> None:
    wide = {**SHAPES, "model.layers.0.mlp.up_proj": (96, 32), "model.layers.1.self_attn.q_proj": (8, 64)}
    experts = [
        expert(tmp_path / "a", base="x"),
        expert(tmp_path / "b", base="y", shapes=wide),
        expert(tmp_path / "c", base="x"),
    ]
    bases, shapes = disagreements(experts)
    assert "a: x" in bases.what
    assert "b: y" in bases.what
    assert "same_base=True" in bases.mend
    assert "model.layers.0.mlp.up_proj: a has [96, 64], but b has [96, 32]" in shapes.what
    assert "model.layers.1.self_attn.q_proj: a has [64, 64], but b has [8, 64]" in shapes.what


def trained_expert(folder: Path, tensors: dict[str, tuple[int, ...]], **config: Any) -> Expert:
    values = {f"base_model.model.{name}": ("F32", np.ones(shape)) for name, shape in tensors.items()}
    return Expert(folder.name, write_adapter(folder, values, **config))


def test_other_kinds_and_other_shapes_of_what_is_trained_are_disagreements(tmp_path: Path) -> None:
    plain = {"m.lora_A.weight": (4, 6), "m.lora_B.weight": (5, 4)}
    as_parameter = {"w.lora_A.weight": (4, 6), "w.lora_B.weight": (5, 4)}
    embedding = {"e.lora_embedding_A": (4, 6), "e.lora_embedding_B": (5, 4)}
    linear = {"e.lora_A.weight": (4, 6), "e.lora_B.weight": (5, 4)}
    head = {"score.weight": (2, 6)}
    tokens = {"e.token_adapter.trainable_tokens_delta": (1, 5)}
    one = trained_expert(
        tmp_path / "one",
        {**plain, **as_parameter, **embedding, **head, **tokens},
        target_parameters=["w.weight"],
        modules_to_save=["score"],
        trainable_token_indices=[3],
        fan_in_fan_out=True,  # the layer that was wrapped last was a Conv1D: no disagreement by itself
    )
    other = trained_expert(
        tmp_path / "other",
        {**plain, "w.lora_A.weight": (4, 6), "w.lora_B.weight": (5, 4), **linear, "score.weight": (3, 6),
         "e.token_adapter.trainable_tokens_delta": (2, 5)},
        modules_to_save=["score"],
        trainable_token_indices=[1, 3],
    )  # fmt: skip
    (found,) = disagreements([one, other])
    said = found.what.split(": ", 1)[1].split("; ")
    assert sorted(said) == [
        "e: one has embedding [5, 6], but other has [5, 6]",
        "score.weight (replaced): one has [2, 6], but other has [3, 6]",
        "w: one has parameter [5, 6], but other has [5, 6]",
    ]


Q = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        # one base as two classes load it, or with a wrapper whose name is an ordinary one
        (f"model.{Q}", f"model.language_model.{Q}", False),
        (f"model.{Q}", f"language_model.model.{Q}", False),
        (f"model.{Q}", Q, False),
        (f"transformer.{Q}", Q, False),
        (f"thinker.model.{Q}", f"model.{Q}", False),
        (f"module.model.{Q}", f"model.{Q}", False),
        ("model.layers.0.module.self_attn.q_proj", f"model.{Q}", False),
        ("model.lm_head", "lm_head", False),
        # wrappers whose names nothing else has
        (f"_orig_mod.model.{Q}", f"model.{Q}", True),
        ("model.layers.0._checkpoint_wrapped_module.self_attn.q_proj", f"model.{Q}", True),
        # modules that are two
        (f"model.{Q}", "model.layers.0.self_attn.v_proj", True),
        (f"model.{Q}", "model.layers.1.self_attn.q_proj", True),
        (f"model.{Q}", f"model.visual.{Q}", True),
        (f"model.encoder.{Q}", f"model.decoder.{Q}", True),
        (f"text_model.encoder.{Q}", f"vision_model.encoder.{Q}", True),
        (f"thinker.model.{Q}", f"talker.model.{Q}", True),
        (f"lm_q.{Q}", f"lm_p.{Q}", True),
        (f"lm_q.{Q}", Q, True),
        # both are called so, in one base
        (f"module.{Q}", f"module.{Q}", True),
    ],
)
def test_other_names_for_the_same_modules_are_a_disagreement(tmp_path: Path, one: str, other: str, agree: bool) -> None:
    shared = {"score": (4, 4)}
    for others in ({}, shared):
        experts = [
            expert(tmp_path / f"{name}{len(others)}", shapes={module: (4, 4), **others})
            for name, module in (("one", one), ("other", other))
        ]
        for same_base in (False, True):
            faults = disagreements(experts, same_base=same_base)
            assert (not faults) == agree
            for fault in faults:
                assert f"one{len(others)} has {one}.weight, but other{len(others)} has {other}.weight" in fault.what


def test_two_modules_of_one_base_may_end_alike(tmp_path: Path) -> None:
    """An expert that has both shows that the base has both."""
    names = (f"module.model.{Q}", f"model.{Q}")
    experts = [expert(tmp_path / str(place), shapes={name: (4, 4)}) for place, name in enumerate(names)]
    assert disagreements(experts)
    assert not disagreements([*experts, expert(tmp_path / "both", shapes=dict.fromkeys(names, (4, 4)))])


def test_other_names_of_what_is_trained_whole_are_a_disagreement(tmp_path: Path) -> None:
    experts = [
        trained_expert(tmp_path / name, {f"{start}score.weight": (2, 6)}, modules_to_save=["score"])
        for name, start in (("one", ""), ("other", "module."))
    ]
    (fault,) = disagreements(experts)
    assert "one has score.weight, but other has module.score.weight" in fault.what
