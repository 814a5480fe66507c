"""What the tests of the doctor have in common: experts as dense vectors, and findings by their kind."""

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


def only(found: Diagnosis, kind: str, severity: str) -> Finding:
    (finding,) = found.of_kind(kind)
    assert finding.severity == severity
    assert finding.where
    assert finding.mend
    return finding


def rewrite(folder: Path, change: Any, **config: Any) -> Path:
    """Write an expert's tensors anew, each as `change(name, values)` says."""
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
    """All deltas of an expert, as one vector."""
    found = oracles.deltas(folder)
    flat: Matrix = np.concatenate([found[name].ravel() for name in sorted(found)])
    return flat


def opposed_share(one: Matrix, other: Matrix) -> float:
    differ = np.sign(one) * np.sign(other) < 0
    return float(((one**2)[differ].sum() / (one**2).sum() + (other**2)[differ].sum() / (other**2).sum()) / 2)
