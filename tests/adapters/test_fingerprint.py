from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from personalized_soups.adapters import fingerprint
from personalized_soups.adapters.fingerprint import base_fingerprint, base_folder
from personalized_soups.errors import InputError
from personalized_soups.files.writer import spec_of, write_safetensors


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(200, 100, generator=generator) for name in ("a.weight", "b.weight", "c.weight")}


def write(path: Path, named: dict[str, Tensor]) -> None:
    write_safetensors(path, [spec_of(name, tensor) for name, tensor in named.items()], named.items())


def folder(root: Path, name: str, named: dict[str, Tensor]) -> Path:
    made = root / name
    made.mkdir()
    write(made / "model.safetensors", named)
    return made


def test_a_resharded_and_reordered_copy_has_the_same_fingerprint(tmp_path: Path) -> None:
    named = tensors()
    whole = folder(tmp_path, "whole", named)
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "one.safetensors", {"c.weight": named["c.weight"], "a.weight": named["a.weight"]})
    write(parts / "two.safetensors", {"b.weight": named["b.weight"]})
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors", "c.weight": "one.safetensors"}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert base_fingerprint(whole) == base_fingerprint(parts)


@pytest.mark.parametrize("whole_below", [1 << 30, 0])
def test_other_values_dtypes_shapes_and_names_have_other_fingerprints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_below: int
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE_BELOW_BYTES", whole_below)
    named = tensors()
    changed = {**named, "b.weight": named["b.weight"].clone()}
    changed["b.weight"][-1, -1] += 1e-6
    swapped = {"a.weight": named["b.weight"], "b.weight": named["a.weight"], "c.weight": named["c.weight"]}
    folders = [
        folder(tmp_path, "0", named),
        folder(tmp_path, "1", changed),
        folder(tmp_path, "2", {name: tensor.half() for name, tensor in named.items()}),
        folder(tmp_path, "3", {name: tensor.reshape(100, 200) for name, tensor in named.items()}),
        folder(tmp_path, "4", swapped),
    ]
    assert len({base_fingerprint(each) for each in folders}) == len(folders)


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder nor a hub id") as caught:
        base_folder(tmp_path / "nowhere")
    assert "nowhere" in caught.value.where


def test_a_name_too_long_for_the_file_system_is_no_base() -> None:
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        base_folder("x" * 5000)
