"""Git LFS pointers in the place of files: named as such, with the command, wherever a file is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from personalized_soups import ExpertLibrary, Profile, merge_into_base
from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.declare.profile import load_profile
from personalized_soups.errors import FileFormatError
from personalized_soups.files.digest import digest_file
from personalized_soups.generation.loading import load_base, load_tokenizer
from personalized_soups.generation.prompts import read_prompts
from personalized_soups.training.data import read_preferences
from tests import oracles
from tests.experts import write_expert
from tests.merging.writing.test_into_base import write_base


def load_weights(folder: Path) -> Any:
    import torch

    return load_base(folder, device=torch.device("cpu"))


# What opens a file, and which file of a model, of an adapter, or by itself.
OPENED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a base's configuration": (BaseModel.open, "config.json"),
    "a base's weights": (BaseModel.open, "model.safetensors"),
    "a base's tokenizer": (BaseModel.open, "tokenizer.json"),
    "a base's tokenizer model": (BaseModel.open, "tokenizer.model"),
    "a base that is recognised": (base_fingerprint, "model.safetensors"),
    "a model that is loaded": (load_weights, "model.safetensors"),
    "a model's configuration": (load_weights, "config.json"),
    "a tokenizer": (load_tokenizer, "tokenizer.json"),
    "a tokenizer's configuration": (load_tokenizer, "tokenizer_config.json"),
    "an adapter's configuration": (LoraAdapter.open, "adapter_config.json"),
    "an adapter's weights": (LoraAdapter.open, "adapter_model.safetensors"),
}
ALONE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "prompts": (read_prompts, "prompts.txt"),
    "pairs": (read_preferences, "pairs.jsonl"),
    "a profile": (load_profile, "profile.yaml"),
    "a file that is hashed": (digest_file, "model.safetensors"),
}


@pytest.mark.parametrize("kind", OPENED)
def test_a_pointer_in_a_folder_is_named(tmp_path: Path, kind: str) -> None:
    act, name = OPENED[kind]
    folder = write_base(tmp_path / "folder", shards=1)
    write_expert(folder)
    (folder / name).write_bytes(oracles.LFS_POINTER)
    with pytest.raises(FileFormatError, match="this is a Git LFS pointer") as caught:
        act(folder)
    assert caught.value.where == str(folder / name)
    assert "`git lfs pull`" in caught.value.mend


@pytest.mark.parametrize("kind", ALONE)
def test_a_pointer_by_itself_is_named(tmp_path: Path, kind: str) -> None:
    act, name = ALONE[kind]
    path = tmp_path / name
    path.write_bytes(oracles.LFS_POINTER)
    with pytest.raises(FileFormatError, match="this is a Git LFS pointer") as caught:
        act(path)
    assert caught.value.where == str(path)


def test_pointers_that_nothing_is_loaded_from_are_no_fault(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=1)
    (base / "logo.png").write_bytes(oracles.LFS_POINTER)
    expert = write_expert(tmp_path / "experts" / "one")
    out = merge_into_base(ExpertLibrary.open(expert), Profile(weights={"one": 1.0}), base, tmp_path / "out")
    assert (out / "logo.png").read_bytes() == oracles.LFS_POINTER
