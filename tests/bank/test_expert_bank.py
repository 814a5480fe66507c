from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.bank.expert_bank import ExpertBank
from tests import oracles
from tests.experts import SHAPES, write_expert

MODULE = "model.layers.0.mlp.up_proj"


def bank_of(root: Path) -> ExpertBank:
    return ExpertBank(list(ExpertLibrary.open(root).values()))


def test_a_stack_holds_each_experts_factors(tmp_path: Path) -> None:
    write_expert(tmp_path / "a", rank=2, seed=1)
    write_expert(tmp_path / "b", rank=3, seed=2, shapes={MODULE: SHAPES[MODULE]})
    bank = bank_of(tmp_path)
    stack = bank.read(MODULE, torch.float64)
    assert stack.a_KI.shape == (5, 64)
    assert stack.b_OK.shape == (96, 5)
    assert (stack.experts, stack.ranks, stack.scalings) == ((0, 1), (2, 3), (4, 8 / 3))
    for name, factors in zip("ab", stack.factors, strict=True):
        a, b = oracles.factors(oracles.read_tensors(tmp_path / name / "adapter_model.safetensors"))[MODULE]
        np.testing.assert_array_equal(factors.a_RI.numpy(), a)
        np.testing.assert_array_equal(factors.b_OR.numpy(), b)
    assert bank.members("model.layers.1.mlp.up_proj") == (0,)


def test_a_shared_basis_is_seen_in_the_bytes_of_a(tmp_path: Path) -> None:
    for index, name in enumerate("abc"):
        write_expert(tmp_path / "shared" / name, seed=index, a_seed=3)
        write_expert(tmp_path / "free" / name, seed=index)
    assert bank_of(tmp_path / "shared").shares_basis
    assert not bank_of(tmp_path / "free").shares_basis
    assert bank_of(tmp_path / "free").basis(MODULE) == (0, 1, 2)


def test_one_changed_bit_ends_a_shared_basis(tmp_path: Path) -> None:
    for index, name in enumerate("ab"):
        write_expert(tmp_path / name, seed=index, a_seed=3, rank=40)
    path = tmp_path / "b" / "adapter_model.safetensors"
    header, data = oracles.split_file(path)
    end = header[f"base_model.model.{MODULE}.lora_A.weight"]["data_offsets"][1]
    changed = bytearray(data)
    changed[end - 4] ^= 1
    path.write_bytes(path.read_bytes()[: -len(data)] + bytes(changed))
    bank = bank_of(tmp_path)
    assert not bank.shares_basis
    assert bank.basis(MODULE) == (0, 1)
    assert bank.basis("model.layers.1.mlp.up_proj") == (0, 0)


def test_equal_bytes_of_other_dtypes_are_no_shared_basis(tmp_path: Path) -> None:
    for name in "ab":
        write_expert(tmp_path / name, a_seed=3, dtype="F16")
    path = tmp_path / "b" / "adapter_model.safetensors"
    header, data = oracles.split_file(tmp_path / "a" / "adapter_model.safetensors")
    for entry in header.values():
        if "dtype" in entry:
            entry["dtype"] = "BF16"
    oracles.write_file(path, json.dumps(header).encode(), data)
    assert not bank_of(tmp_path).shares_basis
