"""The choices of a merge that a profile leaves open, in one value for every function that merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from personalized_soups.methods.method import Method
    from personalized_soups.methods.plugins import DenseMerge


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """How to merge: the method, the size of the result, and where to compute it.

    A value that is None is taken from the profile or from the experts. `plan_merge` checks the values.

    Attributes:
        method: the merge method: a name, a function on dense deltas (see `DenseMerge`), or a `Method`. None takes the
            profile's method.
        method_options: options of the method, such as `{"density": 0.5}`. Each overrides the profile's; options that
            are not given keep the profile's value or the method's default.
        rank: the highest rank of the merged adapter. Modules of a higher rank are truncated, and soup.json records the
            error. None takes the profile's rank; without one, nothing is truncated.
        energy: the share of each module's squared Frobenius norm that truncation keeps, above 0 and at most 1. Each
            module gets the lowest rank that keeps it. Give either `rank` or `energy`.
        dtype: the dtype of the merged adapter: float32, bfloat16 or float16. None takes the experts' dtype if all
            experts have the same one, else float32.
        target: the program that loads the merged adapter: `peft`, or `vllm`, which needs one rank for all modules.
        device: where to compute: `cpu`, `cuda`, `cuda:N`, or `auto`, which is CUDA if there is a GPU, else the
            CPU. Sums of factors that are not truncated are always computed on the CPU.
        same_base: accept experts that name different bases, or bases with different fingerprints, as experts of one
            base.
        base: the base model that a merged adapter is computed with: a folder, or a hub id in the local cache. Required
            if an expert has tensors that are relative to the base: DoRA's magnitudes, biases, saved modules or trained
            tokens.

    Example:
        >>> MergeOptions(method="ties", method_options={"density": 0.3}, rank=16).rank
        16
    """

    method: str | Method | DenseMerge | None = None
    method_options: Mapping[str, float] | None = None
    rank: int | None = None
    energy: float | None = None
    dtype: str | None = None
    target: str = "peft"
    device: str = "auto"
    same_base: bool = False
    base: Path | str | None = None
