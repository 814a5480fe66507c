"""LoRA factors, and the methods that sum A's and B's apart (they are not the sum of the deltas: see each docstring).

R rank, I in features, O out features, K sum of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalized_soups.methods.dense import dare_linear, dare_ties_peft, magnitude_prune, ties_peft
from personalized_soups.methods.streams import Stream

# Below this share of their absolute sum, weights cancel and factor_average would divide by next to nothing.
CANCELLED = 1e-6

# merges the tensors of one side, "A" or "B", by their weights
_Merge = Callable[[Sequence[Tensor], Sequence[float], str], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """One module's low-rank delta: `delta_OI = scaling * b_OR @ a_RI`."""

    a_RI: Tensor  # noqa: N815
    b_OR: Tensor  # noqa: N815
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.a_RI.dim() != 2 or self.b_OR.dim() != 2 or self.a_RI.shape[0] != self.b_OR.shape[1]:
            raise ValueError(f"factors {tuple(self.b_OR.shape)} and {tuple(self.a_RI.shape)} do not multiply")

    @property
    def rank(self) -> int:
        """Rows of A."""
        return int(self.a_RI.shape[0])

    def delta(self) -> Tensor:
        """Return the dense delta_OI, a new tensor in the factors' dtype and on their device."""
        return (self.b_OR @ self.a_RI).mul_(self.scaling)

    def padded(self, rank: int) -> Factors:
        """Return factors of a higher rank with the same delta: rows and columns of zeros are added."""
        missing = rank - self.rank
        if missing <= 0:
            return self
        a_RI = torch.cat([self.a_RI, self.a_RI.new_zeros(missing, self.a_RI.shape[1])], dim=0)
        b_OR = torch.cat([self.b_OR, self.b_OR.new_zeros(self.b_OR.shape[0], missing)], dim=1)
        return Factors(a_RI, b_OR, self.scaling)


def factor_average(factors: Sequence[Factors], weights: Sequence[float], total: float | None = None) -> Factors:
    """Return `dW = (s / t) (sum w_e B_e) (sum w_e A_e)` with `t = sum w_e`, as factors with scaling 1.

    The rule of Personalized Soups (arXiv 2310.11564; its code has equal weights, t = 1). An expert's own delta counts
    `w_e^2 / t` and cross terms `B_i A_j` stay; equal to `linear` where all experts share A.

    Args:
        factors: of the experts that have this module, of one rank.
        weights: theirs.
        total: t, where experts without this module belong to the soup too; the sum of `weights` where left out.

    dtype and device: those of the factors. No argument is changed.

    Raises:
        ValueError: if the ranks or the scalings differ, or the weights cancel (t is about 0).
    """
    _check_same_rank(factors, "factor_average")
    of_a, of_b = average_coefficients([each.scaling for each in factors], weights, total)
    a_RI = _weighted_sum([each.a_RI for each in factors], of_a)
    b_OR = _weighted_sum([each.b_OR for each in factors], of_b)
    return Factors(a_RI, b_OR)


def average_coefficients(
    scalings: Sequence[float], weights: Sequence[float], total: float | None = None
) -> tuple[list[float], list[float]]:
    """Return by what `factor_average` multiplies each expert's A, `w / t`, and each one's B, `w s`.

    Raises:
        ValueError: if the scalings differ, or the weights cancel.
    """
    different = sorted(set(scalings))
    if len(different) > 1:
        raise ValueError(f"factor_average needs equal scalings, these are {', '.join(f'{s:g}' for s in different)}")
    if total is None:
        total = math.fsum(weights)
        if cancels(weights):
            raise ValueError(f"factor_average divides by the sum of the weights, which is {total:g}")
    return [weight / total for weight in weights], [weight * different[0] for weight in weights]


def factor_linear(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return PEFT's `linear`: `A = sum sign(w_e) sqrt(|w_e s_e|) A_e`, `B = sum sqrt(|w_e s_e|) B_e`.

    Own terms are right and cross terms `B_i A_j` stay: the delta is inflated up to n times where n experts share A.
    Kept for comparison with PEFT's add_weighted_adapter(combination_type="linear").

    dtype and device: those of the factors. No argument is changed.

    Raises:
        ValueError: if the ranks differ.
    """
    return _apart(factors, weights, "factor_linear", lambda tensors, roots, _part: _weighted_sum(tensors, roots))


def linear_coefficients(scalings: Sequence[float], weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return by what `factor_linear` multiplies each expert's A, `sign(w s) sqrt(|w s|)`, and each one's B."""
    # PEFT takes the sign of w * s; a scaling of LoRA is never negative unless lora_alpha is
    products = [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
    roots = [math.sqrt(abs(product)) for product in products]
    return [math.copysign(root, product) for root, product in zip(roots, products, strict=True)], roots


def factor_magnitude_prune(factors: Sequence[Factors], weights: Sequence[float], *, density: float) -> Factors:
    """Return PEFT's `magnitude_prune`: `factor_linear` of the largest entries of each A and each B.

    dtype, device and errors: as `factor_linear`.
    """
    return _apart(
        factors,
        weights,
        "factor_magnitude_prune",
        lambda tensors, roots, _part: magnitude_prune(tensors, roots, density=density),
    )


def factor_dare_linear(
    factors: Sequence[Factors], weights: Sequence[float], *, density: float, streams: Sequence[Stream]
) -> Factors:
    """Return PEFT's `dare_linear`: `factor_linear` of each A and each B after DARE's drop and rescale.

    A's are drawn from the streams' children "A", B's from their children "B". dtype, device and errors: as
    `factor_linear`.
    """
    return _apart(
        factors,
        weights,
        "factor_dare_linear",
        lambda tensors, roots, part: dare_linear(tensors, roots, density=density, streams=_children(streams, part)),
    )


def factor_ties(factors: Sequence[Factors], weights: Sequence[float], *, density: float) -> Factors:
    """Return PEFT's `ties`: `ties_peft` of the A's, weights `sign(w_e) sqrt(|w_e s_e|)`, and of the B's, without sign.

    The A's and the B's elect their signs apart, so an entry's sign in A says nothing about its delta's.

    dtype, device and errors: as `factor_linear`.
    """
    return _apart(
        factors, weights, "factor_ties", lambda tensors, roots, _part: ties_peft(tensors, roots, density=density)
    )


def factor_dare_ties(
    factors: Sequence[Factors], weights: Sequence[float], *, density: float, streams: Sequence[Stream]
) -> Factors:
    """Return PEFT's `dare_ties`: `factor_ties` with DARE's drop and rescale in place of trimming.

    Streams as in `factor_dare_linear`; dtype, device and errors as `factor_linear`.
    """
    return _apart(
        factors,
        weights,
        "factor_dare_ties",
        lambda tensors, roots, part: dare_ties_peft(tensors, roots, density=density, streams=_children(streams, part)),
    )


def cancels(weights: Sequence[float]) -> bool:
    """Return whether the sum of the weights is about 0, measured against the sum of their magnitudes."""
    return abs(math.fsum(weights)) <= CANCELLED * math.fsum(abs(weight) for weight in weights)


def _apart(factors: Sequence[Factors], weights: Sequence[float], method: str, merge: _Merge) -> Factors:
    """Return what `merge` makes of the A's and of the B's, each with the roots of the weights: PEFT's frame."""
    _check_same_rank(factors, method)
    signed, roots = linear_coefficients([each.scaling for each in factors], weights)
    return Factors(
        merge([each.a_RI for each in factors], signed, "A"), merge([each.b_OR for each in factors], roots, "B")
    )


def _children(streams: Sequence[Stream], part: str) -> list[Stream]:
    return [stream.child(part) for stream in streams]


def _weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return the sum in the tensors' dtype, rounded once: it is taken in float64."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        total.add_(tensor, alpha=coefficient)
    return total.to(tensors[0].dtype)


def _check_same_rank(factors: Sequence[Factors], method: str) -> None:
    ranks = [each.rank for each in factors]
    if not ranks:
        raise ValueError(f"{method} of no factors")
    if len(set(ranks)) > 1:
        raise ValueError(f"{method} needs equal ranks, these are {', '.join(map(str, ranks))}")
