"""The options that all merge functions accept."""

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
    """The merge method, the size of the result, and the device of a merge.

    `plan_merge` checks the values.

    Attributes:
        method: the merge method. It is a name, a function on dense deltas (see `DenseMerge`), or a `Method`. With None,
            the profile's method is used.
        method_options: options of the method, such as `{"density": 0.5}`. An option that is not given here has the
            profile's value if the profile sets it, else the method's default.
        rank: the maximum rank of the merged adapter. Modules of a higher rank are truncated, and soup.json records the
            truncation error. With None, the profile's rank is used. If the profile has no rank, nothing is truncated.
        energy: the share of each module's squared Frobenius norm that truncation keeps, above 0 and at most 1. Each
            module gets the lowest rank that keeps this share. Only one of `rank` and `energy` may be given.
        dtype: the dtype of the merged adapter: float32, bfloat16 or float16. With None, the dtype is that of the
            experts if all experts have the same dtype, else float32.
        target: the program that will load the merged adapter, `peft` or `vllm`. An adapter for `vllm` has the same rank
            in all modules.
        device: the device that computes the soup: `cpu`, `cuda`, `cuda:N` or `auto`. With `auto`, a CUDA GPU is used if
            there is one, else the CPU. Sums of factors that are not truncated are always computed on the CPU.
        same_base: merge experts even if their files name different bases or record different fingerprints of the base.
        base: the folder of the base model of a merged adapter, or the id of a model in the local hub cache. A base is
            required if an expert trained DoRA magnitudes, biases, tokens or whole modules, because their values are
            relative to the base.
        on: the folder of the adapter, such as an SFT adapter, on top of which the experts were trained. The result then
            includes the adapter's delta exactly once: with weight 1, unscaled by the profile or the method, and not
            truncated. With None, the result of such experts is an adapter that must be loaded in addition to `on`.

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
    on: Path | str | None = None
