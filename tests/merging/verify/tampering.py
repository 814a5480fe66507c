"""Change the output of a merge, for the tests of verify: bits of tensors, and keys of JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from personalized_soups import ExpertLibrary, Profile
from personalized_soups.merging.verify.verification import Verification
from tests import oracles
from tests.experts import write_expert

NAMES = ("one", "two", "three")
WEIGHTS = (0.7, -0.4, 1.3)
PROFILE = Profile(weights=dict(zip(NAMES, WEIGHTS, strict=True)))
WEIGHTS_FILE = "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
_BITS = {"F32": "<u4", "BF16": "<u2", "F16": "<u2"}


def library_in(root: Path, *, ranks: tuple[int, ...] = (2, 4, 3), **options: Any) -> ExpertLibrary:
    for index, (name, rank) in enumerate(zip(NAMES, ranks, strict=True)):
        write_expert(root / name, seed=index, rank=rank, **options)
    return ExpertLibrary.open(root)


def change_bits(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Replace one tensor's bits, as unsigned integers, by `change(bits)`."""
    content = bytearray(path.read_bytes())
    header, data = oracles.split_file(path)
    entry = header[name]
    start, end = (len(content) - len(data) + offset for offset in entry["data_offsets"])
    bits = np.frombuffer(bytes(content[start:end]), _BITS[entry["dtype"]])
    content[start:end] = change(bits).astype(bits.dtype).tobytes()
    path.write_bytes(content)


def nudged(bits: Any) -> Any:
    """Move every element one ulp away from zero."""
    return bits + 1


def flipped(bit: int, index: int = 5) -> Callable[[Any], Any]:
    def change(bits: Any) -> Any:
        changed = bits.copy()
        changed[index] ^= 1 << bit
        return changed

    return change


def edit(path: Path, *keys: str | int, to: Any) -> None:
    table = json.loads(path.read_text())
    inner = table
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(table))


def check_sound(verification: Verification, verdict: str = "identical") -> None:
    assert (verification.verdict, verification.faults) == (verdict, ())
    assert verification.is_sound


def faults_of(verification: Verification) -> dict[str, str]:
    """Return the text of every fault by its subject and place. A folder with faults is never sound."""
    assert verification.faults
    assert not verification.is_sound
    return {f"{fault.subject} {fault.where}": fault.what for fault in verification.faults}
