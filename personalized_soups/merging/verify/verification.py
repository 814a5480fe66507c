"""What verifying a merged folder finds: how its tensors compare with what is recomputed, and every other fault."""

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
    """One thing that is not as the record says: what kind of thing, where it stands, and what is wrong."""

    subject: Subject
    where: str
    what: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor whose bytes are others than those recomputed.

    `largest` is the largest element of the difference, `relative` its Frobenius norm over that of what is recomputed;
    None where a value is NaN or infinite. `is_rounding` says whether arithmetic in another order explains it.
    """

    name: str
    largest: float | None
    relative: float | None
    is_rounding: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """The tensors of a folder beside those recomputed."""

    num_tensors: int
    differences: tuple[Difference, ...]
    faults: tuple[Fault, ...]

    @property
    def verdict(self) -> Verdict:
        """What the tensors are, one by one and all together."""
        if self.faults or not all(each.is_rounding for each in self.differences):
            return "different"
        return "equal to rounding" if self.differences else "identical"


@dataclass(frozen=True, slots=True)
class Verification:
    """What is known of a merged folder.

    `verdict` is of the tensors alone; `differences` are the worst of them, at most 8; `faults` is everything else.
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
        """Put together what was found; without a comparison nothing could be recomputed."""
        if compared is None:
            return cls(folder, kind, "not recomputed", faults=tuple(faults))
        rounded = sum(each.is_rounding for each in compared.differences)
        worst = sorted(compared.differences, key=lambda each: (each.is_rounding, -_size(each.relative)))
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
        """Whether the folder is what it claims to be."""
        return self.verdict in {"identical", "equal to rounding"} and not self.faults

    def as_json(self) -> dict[str, Any]:
        """Return everything as one JSON object."""
        return {"sound": self.is_sound, **asdict(self)}


class Distance:
    """Sums up how far blocks of a tensor, as they are written, are from those recomputed."""

    def __init__(self) -> None:
        self._largest = 0.0
        self._squares = 0.0
        self._norm_squares = 0.0
        self._is_rounding = True
        self.is_equal = True

    def add_equal(self, recomputed: Tensor) -> None:
        """Take a block that is equal byte for byte."""
        self._norm_squares += float(torch.linalg.vector_norm(recomputed, dtype=_wide(recomputed))) ** 2

    def add(self, written: Tensor, recomputed: Tensor, room: Tensor | None) -> None:
        """Take a block that is not; `room` is how far each element may be off, None for not at all. All on the CPU."""
        apart = (written.double() - recomputed.double()).abs_()
        self.is_equal = False
        self._largest = max(self._largest, _number(apart.max()))
        self._squares += float(apart.square().sum())
        self._norm_squares += float(recomputed.double().square().sum())
        # put so that NaN is beyond any room
        self._is_rounding &= room is not None and bool((apart <= room).all())

    def result(self, name: str) -> Difference:
        """Return what was found of a tensor that differs."""
        relative = math.sqrt(self._squares / self._norm_squares) if self._norm_squares > 0 else math.inf
        return Difference(name, finite(self._largest), finite(relative), self._is_rounding)

    @property
    def may_be_rounding(self) -> bool:
        """Whether every element is within its room so far."""
        return self._is_rounding


def finite(value: float) -> float | None:
    """Return a number that JSON has, or None."""
    return value if math.isfinite(value) else None


def _number(value: Tensor) -> float:
    return float(value) if bool(torch.isfinite(value)) else math.inf


def _size(relative: float | None) -> float:
    return math.inf if relative is None else relative


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
