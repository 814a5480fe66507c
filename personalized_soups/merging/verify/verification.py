"""The results of `verify`: differences between tensors, and other faults of a merged folder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Verdict = Literal["identical", "equal to rounding", "different", "not recomputed"]
Subject = Literal["expert", "base", "record", "file", "configuration", "tensor"]

_MAX_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Fault:
    """A disagreement between a merged folder and its soup.json.

    Attributes:
        subject: the kind of thing that disagrees.
        where: the file, folder, key or tensor that disagrees.
        what: a phrase that continues `where` and describes the disagreement.
    """

    subject: Subject
    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor whose bytes differ from the bytes of the recomputed tensor.

    Attributes:
        name: the tensor's name.
        largest: the largest magnitude of the difference. None if a value is NaN or infinite.
        relative: the Frobenius norm of the difference divided by the norm of the recomputed tensor. None if a value is
            NaN or infinite.
        is_rounding: whether another order of the arithmetic can explain the difference.
    """

    name: str
    largest: float | None
    relative: float | None
    is_rounding: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of a folder's tensors with the recomputed tensors.

    Attributes:
        num_tensors: the number of recomputed tensors.
        differences: the tensors whose bytes differ.
        faults: the tensors that are missing, that do not belong to the soup, or that have another shape or dtype.
    """

    num_tensors: int
    differences: tuple[Difference, ...]
    faults: tuple[Fault, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict on all tensors: `identical`, `equal to rounding` or `different`."""
        if self.faults or not all(difference.is_rounding for difference in self.differences):
            return "different"
        return "equal to rounding" if self.differences else "identical"


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify`.

    Attributes:
        folder: the merged folder.
        kind: `adapter` or `model`.
        verdict: the verdict on the tensors.
        num_tensors: the number of recomputed tensors.
        num_rounded: the number of tensors that differ only by rounding.
        num_different: the number of tensors that differ by more than rounding.
        differences: the tensors that differ most, at most 8, with the largest difference first.
        faults: all disagreements except different values of tensors.
    """

    folder: str
    kind: Literal["adapter", "model"]
    verdict: Verdict
    num_tensors: int = 0
    num_rounded: int = 0
    num_different: int = 0
    differences: tuple[Difference, ...] = ()
    faults: tuple[Fault, ...] = field(default=())

    @classmethod
    def of(
        cls, folder: str, kind: Literal["adapter", "model"], compared: Comparison | None, faults: Iterable[Fault]
    ) -> Verification:
        """Return the verification. If `compared` is None, its verdict is `not recomputed`."""
        if compared is None:
            return cls(folder, kind, "not recomputed", faults=tuple(faults))
        rounded = sum(difference.is_rounding for difference in compared.differences)
        worst = sorted(
            compared.differences, key=lambda difference: (difference.is_rounding, -_size(difference.relative))
        )
        return cls(
            folder=folder,
            kind=kind,
            verdict=compared.verdict,
            num_tensors=compared.num_tensors,
            num_rounded=rounded,
            num_different=len(compared.differences) - rounded,
            differences=tuple(worst[:_MAX_SHOWN]),
            faults=(*faults, *compared.faults),
        )

    @property
    def is_sound(self) -> bool:
        """Whether the tensors and everything else in the folder agree with its soup.json."""
        return self.verdict in {"identical", "equal to rounding"} and not self.faults

    def as_json(self) -> dict[str, Any]:
        """Return the verification as one JSON object."""
        return {"sound": self.is_sound, **asdict(self)}


class Distance:
    """The distance of a written tensor from the recomputed tensor, added up block by block.

    Attributes:
        is_equal: whether all blocks so far are equal byte for byte.
    """

    def __init__(self) -> None:
        self._largest = 0.0
        self._squares = 0.0
        self._norm_squares = 0.0
        self._is_rounding = True
        self.is_equal = True

    def add_equal(self, recomputed: Tensor) -> None:
        """Add a block that is equal byte for byte."""
        self._norm_squares += float(torch.linalg.vector_norm(recomputed, dtype=_wide(recomputed))) ** 2

    def add(self, written: Tensor, recomputed: Tensor, room: Tensor | None) -> None:
        """Add a block that is not equal.

        Args:
            written: the written block, on the CPU.
            recomputed: the recomputed block, on the CPU.
            room: how far each element may differ by rounding, on the CPU. None if the blocks must be equal.
        """
        apart = (written.double() - recomputed.double()).abs_()
        self.is_equal = False
        self._largest = max(self._largest, _number(apart.max()))
        self._squares += float(apart.square().sum())
        self._norm_squares += float(recomputed.double().square().sum())
        # written as `<=` so that NaN counts as different
        self._is_rounding &= room is not None and bool((apart <= room).all())

    def result(self, name: str) -> Difference:
        """Return the difference between the tensors. `name` is the name of the tensor."""
        relative = math.sqrt(self._squares / self._norm_squares) if self._norm_squares > 0 else math.inf
        return Difference(name, finite(self._largest), finite(relative), self._is_rounding)

    @property
    def may_be_rounding(self) -> bool:
        """Whether rounding can explain the differences in all blocks so far."""
        return self._is_rounding


def finite(value: float) -> float | None:
    """Return the number, or None if it is NaN or infinite, because JSON cannot represent these values."""
    return value if math.isfinite(value) else None


def _number(value: Tensor) -> float:
    return float(value) if bool(torch.isfinite(value)) else math.inf


def _size(relative: float | None) -> float:
    return math.inf if relative is None else relative


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
