"""Train an expert on a GGUF file whose padding token is its end token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.provenance import read_expert_record
from personalized_soups.bases.place import place_of
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.training.expert import train_expert
from tests.gguf_files import Fields, write_gguf


def test_the_end_token_counts_although_it_is_the_padding_token(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The expert is the one trained on a base with a padding token of its own: padding never counts, its token does.

    If the end tokens were masked as padding, their losses would be missing, and the experts would differ.
    """
    monkeypatch.setenv("PSOUPS_CACHE", str(tmp_path / "cache"))

    def pads_with_end(fields: Fields, _: Any) -> None:
        fields["tokenizer.ggml.padding_token_id"] = fields["tokenizer.ggml.eos_token_id"]

    file = write_gguf(tmp_path / "small.gguf", small_base, change=pads_with_end)
    tokenizer = load_tokenizer(file)
    assert tokenizer.pad_token == tokenizer.eos_token
    bases: dict[str, str | Path] = {"folder": small_base, "file": str(file)}
    experts = {
        name: train_expert("concise", base=base, data=pairs_file, out=tmp_path / name, recipe=recipe, device="cpu")
        for name, base in bases.items()
    }
    folder, own = (load_file(experts[name] / "adapter_model.safetensors") for name in ("folder", "file"))
    assert folder.keys() == own.keys()
    assert all(torch.equal(folder[name], own[name]) for name in folder)
    assert any(bool(tensor.any()) for name, tensor in own.items() if "lora_B" in name)
    record = read_expert_record(experts["file"])
    assert record is not None
    assert record.base.fingerprint == base_fingerprint(place_of(file)) == base_fingerprint(small_base)
