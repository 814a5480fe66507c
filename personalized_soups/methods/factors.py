"""LoRA factors, and the merge methods that sum A's and B's separately.

These methods do not return the sum of the deltas: `(sum B)(sum A)` also has the cross terms `B_i A_j`.

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

# Weights cancel if their sum is at most this share of the sum of their magnitudes. factor_average divides by the sum,
# which would amplify rounding errors more than a million times.
CANCELLED = 1e-6

# merges either the A's or the B's by their weights; the last argument is "A" or "B"
_Merge = Callable[[Sequence[Tensor], Sequence[float], str], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """One module's low-rank delta: `delta_OI = scaling * b_OR @ a_RI`.

    Attributes:
        a_RI: A.
        b_OR: B, of the same dtype and on the same device.
        scaling: LoRA's `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA (arXiv 2312.03732).
    """

    a_RI: Tensor  # noqa: N815
    b_OR: Tensor  # noqa: N815
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.a_RI.dim() != 2 or self.b_OR.dim() != 2 or self.a_RI.shape[0] != self.b_OR.shape[1]:
            raise ValueError(
                f"B of shape {tuple(self.b_OR.shape)} and A of shape {tuple(self.a_RI.shape)} cannot be multiplied"
            )

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return int(self.a_RI.shape[0])

    def delta(self) -> Tensor:
        """Return the dense delta_OI, a new tensor in the factors' dtype and on their device."""
        return (self.b_OR @ self.a_RI).mul_(self.scaling)

    def padded(self, rank: int) -> Factors:
        """Return factors of the same delta with at least `rank` rows of A, by adding rows and columns of zeros."""
        missing = rank - self.rank
        if missing <= 0:
            return self
        a_RI = torch.cat([self.a_RI, self.a_RI.new_zeros(missing, self.a_RI.shape[1])], dim=0)
        b_OR = torch.cat([self.b_OR, self.b_OR.new_zeros(self.b_OR.shape[0], missing)], dim=1)
        return Factors(a_RI, b_OR, self.scaling)


def factor_average(factors: Sequence[Factors], weights: Sequence[float], total: float | None = None) -> Factors:
    """Return `dW = (s / t) (sum w_e B_e) (sum w_e A_e)` with `t = sum w_e`, as factors with scaling 1.

    The rule of Personalized Soups (arXiv 2310.11564; its code has equal weights and t = 1). An expert's own delta
    counts `w_e^2 / t`, and cross terms `B_i A_j` are added. If all experts share A, the result equals `linear`.

    Args:
        factors: one per expert that adapts this module, all of one rank.
        weights: one per expert in `factors`.
        total: t, if the soup also has experts that do not adapt this module. Default: the sum of `weights`.

    dtype and device: those of the factors. No argument is changed.

    Raises:
        ValueError: if the ranks or the scalings differ, or if the weights cancel (t is about 0).
    """
    _check_same_rank(factors, "factor_average")
    of_a, of_b = average_coefficients([each.scaling for each in factors], weights, total)
    a_RI = _weighted_sum([each.a_RI for each in factors], of_a)
    b_OR = _weighted_sum([each.b_OR for each in factors], of_b)
    return Factors(a_RI, b_OR)


def average_coefficients(
    scalings: Sequence[float], weights: Sequence[float], total: float | None = None
) -> tuple[list[float], list[float]]:
    """Return the coefficients of `factor_average`: `w / t` for each expert's A, and `w s` for each expert's B.

    Raises:
        ValueError: if the scalings differ, or if the weights cancel.
    """
    different = sorted(set(scalings))
    if len(different) > 1:
        raise ValueError(f"factor_average needs equal scalings, not {', '.join(f'{s:g}' for s in different)}")
    if total is None:
        total = math.fsum(weights)
        if cancels(weights):
            raise ValueError(f"factor_average divides by the sum of the weights, which is about 0: {total:g}")
    # the scaling goes into B, so that a sum of shared A's is that A times 1
    return [weight / total for weight in weights], [weight * different[0] for weight in weights]


def factor_linear(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return PEFT's `linear`: `A = sum sign(w_e) sqrt(|w_e s_e|) A_e`, `B = sum sqrt(|w_e s_e|) B_e`.

    An expert's own delta counts `w_e`, as it should, and cross terms `B_i A_j` are added: if n experts share A, the
    delta is up to n times too large. For comparison with PEFT's add_weighted_adapter(combination_type="linear").

    dtype and device: those of the factors. No argument is changed.

    Raises:
        ValueError: if the ranks differ.
    """
    return _separately(factors, weights, "factor_linear", lambda tensors, roots, _part: _weighted_sum(tensors, roots))


def linear_coefficients(scalings: Sequence[float], weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the coefficients of `factor_linear`: `sign(w s) sqrt(|w s|)` for each A, `sqrt(|w s|)` for each B."""
    # the sign of w * s, as in PEFT; s is negative only if lora_alpha is
    products = [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
    roots = [math.sqrt(abs(product)) for product in products]
    return [math.copysign(root, product) for root, product in zip(roots, products, strict=True)], roots


def factor_magnitude_prune(factors: Sequence[Factors], weights: Sequence[float], *, density: float) -> Factors:
    """Return PEFT's `magnitude_prune`: `factor_linear` of the largest entries of each A and each B.

    dtype, device and errors: as `factor_linear`.
    """
    return _separately(
        factors,
        weights,
        "factor_magnitude_prune",
        lambda tensors, roots, _part: magnitude_prune(tensors, roots, density=density),
    )


def factor_dare_linear(
    factors: Sequence[Factors], weights: Sequence[float], *, density: float, streams: Sequence[Stream]
) -> Factors:
    """Return PEFT's `dare_linear`: `factor_linear` of each A and each B after DARE's drop and rescale.

    The A's draw from each stream's child "A", the B's from its child "B". dtype, device and errors: as
    `factor_linear`.
    """
    return _separately(
        factors,
        weights,
        "factor_dare_linear",
        lambda tensors, roots, part: dare_linear(tensors, roots, density=density, streams=_children(streams, part)),
    )


def factor_ties(factors: Sequence[Factors], weights: Sequence[float], *, density: float) -> Factors:
    """Return PEFT's `ties`: `ties_peft` of the A's, weights `sign(w_e) sqrt(|w_e s_e|)`, and of the B's, without sign.

    The A's and the B's elect their signs separately, and the sign of an entry of A or B does not decide the sign of any
    entry of the delta. Experts that agree in their deltas may therefore cancel, and the reverse.

    dtype, device and errors: as `factor_linear`.
    """
    return _separately(
        factors, weights, "factor_ties", lambda tensors, roots, _part: ties_peft(tensors, roots, density=density)
    )


def factor_dare_ties(
    factors: Sequence[Factors], weights: Sequence[float], *, density: float, streams: Sequence[Stream]
) -> Factors:
    """Return PEFT's `dare_ties`: `factor_ties` with DARE's drop and rescale in place of trimming.

    Streams as in `factor_dare_linear`; dtype, device and errors as `factor_linear`.
    """
    return _separately(
        factors,
        weights,
        "factor_dare_ties",
        lambda tensors, roots, part: dare_ties_peft(tensors, roots, density=density, streams=_children(streams, part)),
    )


def cancels(weights: Sequence[float]) -> bool:
    """Return whether the sum of the weights is about 0, relative to the sum of their magnitudes."""
    return abs(math.fsum(weights)) <= CANCELLED * math.fsum(abs(weight) for weight in weights)


def _separately(factors: Sequence[Factors], weights: Sequence[float], method: str, merge: _Merge) -> Factors:
    """Merge the A's and the B's separately, each weighted by the roots of the weights, as PEFT does."""
    # the roots multiply to w * s, so each expert's own delta keeps its weight; PEFT, too, splits w * s and not w alone
    _check_same_rank(factors, method)
    signed, roots = linear_coefficients([each.scaling for each in factors], weights)
    return Factors(
        merge([each.a_RI for each in factors], signed, "A"), merge([each.b_OR for each in factors], roots, "B")
    )


def _children(streams: Sequence[Stream], part: str) -> list[Stream]:
    return [stream.child(part) for stream in streams]


def _weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return the sum in the tensors' dtype: computed in float64 and rounded once."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, coefficient in zip(tensors, coefficients, strict=True):
        total.add_(tensor, alpha=coefficient)
    return total.to(tensors[0].dtype)


def _check_same_rank(factors: Sequence[Factors], method: str) -> None:
    ranks = [each.rank for each in factors]
    if not ranks:
        raise ValueError(f"there are no factors for {method}: give the factors of at least one expert")
    if len(set(ranks)) > 1:
        raise ValueError(f"{method} needs equal ranks, not {', '.join(map(str, ranks))}")
