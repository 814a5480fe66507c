"""Helpers for the tests of the doctor: experts as dense vectors, and findings by their kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from personalized_soups import ExpertLibrary
from personalized_soups.merging.doctor.diagnose import diagnose
from personalized_soups.merging.doctor.diagnosis import Diagnosis, Finding
from tests import oracles
from tests.experts import write_config
from tests.oracles import Matrix

WEIGHTS_FILE = "adapter_model.safetensors"


def diagnosed(root: Path, **options: Any) -> Diagnosis:
    return diagnose(ExpertLibrary.open(root), **options)


def only(diagnosis: Diagnosis, kind: str, severity: str) -> Finding:
    (finding,) = diagnosis.of_kind(kind)
    assert finding.severity == severity
    assert finding.where
    assert finding.mend
    return finding


def rewrite(folder: Path, change: Any, **config: Any) -> Path:
    """Replace each tensor of an expert by `change(name, values)`."""
    tensors = oracles.read_tensors(folder / WEIGHTS_FILE)
    oracles.write_tensors(
        folder / WEIGHTS_FILE,
        {name: ("F32", change(name, values)) for name, values in tensors.items()},
        {"format": "pt"},
    )
    if config:
        write_config(folder, **config)
    return folder


def vector(folder: Path) -> Matrix:
    """Return all deltas of an expert as one vector."""
    deltas = oracles.deltas(folder)
    flat: Matrix = np.concatenate([deltas[name].ravel() for name in sorted(deltas)])
    return flat


def opposed_share(first: Matrix, second: Matrix) -> float:
    differ = np.sign(first) * np.sign(second) < 0
    return float(((first**2)[differ].sum() / (first**2).sum() + (second**2)[differ].sum() / (second**2).sum()) / 2)
