"""How far an output is from dense float64 arithmetic in NumPy, which shares no code with the project.

Measured at all modules of the first and the last layer. R rank, I in features, O out features.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[np.float64]


def main(experts: str, weights: dict[str, float], out: str, rank: int | None = None, base: str | None = None) -> None:
    """Print the largest relative Frobenius error of a module; into a base, the largest share of an element's bound.

    The bound: half a unit in the last place of the result, and (K + 2) 2^-24 of the sum of all magnitudes added up.
    """
    sources = [(weight, _Adapter(Path(experts) / name)) for name, weight in weights.items()]
    names = sources[0][1].modules
    layers = {name.split(".")[2] for name in names}
    ends = {min(layers, key=int), max(layers, key=int)}
    chosen = [name for name in names if name.split(".")[2] in ends]
    if base is None:
        merged = _Adapter(Path(out))
        errors = [_relative_error(merged.delta(name), sources, name, rank) for name in chosen]
    else:
        errors = [_share_of_bound(Path(base), Path(out), sources, name) for name in chosen]
    print(json.dumps({"error": max(errors), "modules": len(chosen)}))


class _Adapter:
    """An adapter folder, read by the reference reader."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        self.scaling = config["lora_alpha"] / config["r"]
        self._file = _opened(folder / "adapter_model.safetensors", "numpy")
        keys = [key for key in self._file.keys() if key.endswith(".lora_A.weight")]  # noqa: SIM118 - not a mapping
        self.modules = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in keys]

    def factors(self, name: str) -> tuple[Array, Array]:
        a_RI, b_OR = (self._file.get_tensor(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        return a_RI.astype(np.float64), b_OR.astype(np.float64) * self.scaling

    def delta(self, name: str) -> Array:
        a_RI, b_OR = self.factors(name)
        return b_OR @ a_RI


def _relative_error(got_OI: Array, sources: list[tuple[float, _Adapter]], name: str, rank: int | None) -> float:
    factors = [(weight, *adapter.factors(name)) for weight, adapter in sources]
    b_OK = np.concatenate([weight * b_OR for weight, _, b_OR in factors], axis=1)
    a_KI = np.concatenate([a_RI for _, a_RI, _ in factors], axis=0)
    want_OI = b_OK @ a_KI
    if rank is not None:
        # the row space of a_KI holds the delta's: its singular vectors are found there, without an O x I decomposition
        q_IK, r_KK = np.linalg.qr(a_KI.T)
        left, values, right = np.linalg.svd(b_OK @ r_KK.T, full_matrices=False)
        want_OI = (left[:, :rank] * values[:rank]) @ right[:rank] @ q_IK.T
    return float(np.linalg.norm(got_OI - want_OI) / np.linalg.norm(want_OI))


def _share_of_bound(base: Path, out: Path, sources: list[tuple[float, _Adapter]], name: str) -> float:
    w_OI, got_OI = (_tensor(folder, f"{name}.weight") for folder in (base, out))
    want_OI, magnitude_OI = w_OI.copy(), np.abs(w_OI)
    num_ranks = 0
    for weight, adapter in sources:
        a_RI, b_OR = adapter.factors(name)
        want_OI += weight * (b_OR @ a_RI)
        magnitude_OI += abs(weight) * (np.abs(b_OR) @ np.abs(a_RI))
        num_ranks += a_RI.shape[0]
    # bfloat16 keeps 8 bits, the first of them implied: a unit in the last place of x in [2^e, 2^(e+1)) is 2^(e-7)
    _, exponent = np.frexp(want_OI)
    half_ulp = np.ldexp(1.0, exponent - 9)
    return float((np.abs(got_OI - want_OI) / (half_ulp + (num_ranks + 2) * 2.0**-24 * magnitude_OI)).max())


def _tensor(folder: Path, name: str) -> Array:
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text(encoding="utf-8"))["weight_map"][name] if index.is_file() else "model.safetensors"
    # NumPy has no bfloat16: torch widens it, which changes no value
    values: Array = _opened(folder / file, "pt").get_tensor(name).double().numpy()
    return values


def _opened(file: Path, framework: str) -> Any:
    return safe_open(file, framework=framework)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
