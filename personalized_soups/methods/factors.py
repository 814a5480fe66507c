"""LoRA factors, and the merge methods that sum the experts' A's and B's separately.

The result of these methods is not the sum of the deltas: `(sum B)(sum A)` also contains the cross terms `B_i A_j`.

In the formulas, `w_e`, `s_e`, `A_e` and `B_e` are the weight, the scaling and the factors of expert e.

Shapes: R = rank, I = in_features, O = out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalized_soups.methods.dense import dare_linear, dare_ties_peft, magnitude_prune, ties_peft
from personalized_soups.methods.streams import Stream

# Weights cancel if their sum is at most this share of the sum of their magnitudes. factor_average divides by the sum of
# the weights. A smaller sum would multiply rounding errors by more than a million.
CANCELLED = 1e-6

# A function that merges either the A's or the B's with their weights. The last argument is "A" or "B".
_Merge = Callable[[Sequence[Tensor], Sequence[float], str], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """The low-rank delta of one module: `delta_OI = scaling * b_OR @ a_RI`.

    Attributes:
        a_RI: the factor A.
        b_OR: the factor B. It has the dtype of A and is on the same device.
        scaling: LoRA's `alpha / rank`, or rsLoRA's `alpha / sqrt(rank)` (arXiv 2312.03732).
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
        """Return the dense delta_OI as a new tensor with the dtype and the device of the factors."""
        return (self.b_OR @ self.a_RI).mul_(self.scaling)

    def padded(self, rank: int) -> Factors:
        """Return factors of the same delta with a rank of at least `rank`.

        Rows of zeros are added to A, and columns of zeros to B. Factors that already have the rank are returned
        unchanged.
        """
        missing = rank - self.rank
        if missing <= 0:
            return self
        a_RI = torch.cat([self.a_RI, self.a_RI.new_zeros(missing, self.a_RI.shape[1])], dim=0)
        b_OR = torch.cat([self.b_OR, self.b_OR.new_zeros(self.b_OR.shape[0], missing)], dim=1)
        return Factors(a_RI, b_OR, self.scaling)


def factor_average(factors: Sequence[Factors], weights: Sequence[float], total: float | None = None) -> Factors:
    """Return `dW = (s / t) (sum w_e B_e) (sum w_e A_e)` with `t = sum w_e`, as factors with scaling 1.

    This is the rule of Personalized Soups (arXiv 2310.11564). The authors' code has equal weights and t = 1. An
    expert's own delta has the factor `w_e^2 / t` in the result, and the cross terms `B_i A_j` are added. If all experts
    have the same A, the result equals `linear`. The result has the dtype and the device of the factors. No argument is
    changed.

    Args:
        factors: one per expert that adapts this module. All must have one rank and one scaling s.
        weights: one per element of `factors`.
        total: the sum t, if the soup also has experts that do not adapt this module. The default is the sum of
            `weights`.

    Raises:
        ValueError: if the ranks or the scalings differ, or if `total` is None and the sum of the weights is about 0.
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
        ValueError: if the scalings differ, or if `total` is None and the sum of the weights is about 0.
    """
    different = sorted(set(scalings))
    if len(different) > 1:
        raise ValueError(f"factor_average needs equal scalings, not {', '.join(f'{s:g}' for s in different)}")
    if total is None:
        total = math.fsum(weights)
        if cancels(weights):
            raise ValueError(f"factor_average divides by the sum of the weights, which is about 0: {total:g}")
    # the scaling is applied to B only, so that the weighted sum of equal A's is exactly that A
    return [weight / total for weight in weights], [weight * different[0] for weight in weights]


def factor_linear(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Return PEFT's `linear`: `A = sum sign(w_e s_e) sqrt(|w_e s_e|) A_e` and `B = sum sqrt(|w_e s_e|) B_e`.

    An expert's own delta has the factor `w_e` in the result, as it should. But the cross terms `B_i A_j` are added: if
    n experts have the same A, the delta is up to n times too large. Use this method to compare with PEFT's
    add_weighted_adapter(combination_type="linear"). The result has the dtype and the device of the factors. No argument
    is changed.

    Raises:
        ValueError: if the ranks differ.
    """
    return _separately(factors, weights, "factor_linear", lambda tensors, roots, _part: _weighted_sum(tensors, roots))


def linear_coefficients(scalings: Sequence[float], weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the coefficients of `factor_linear`.

    They are `sign(w s) sqrt(|w s|)` for each expert's A, and `sqrt(|w s|)` for each expert's B.
    """
    # the sign is that of w * s, as in PEFT; s is negative only if lora_alpha is negative
    products = [weight * scaling for weight, scaling in zip(weights, scalings, strict=True)]
    roots = [math.sqrt(abs(product)) for product in products]
    return [math.copysign(root, product) for root, product in zip(roots, products, strict=True)], roots


def factor_magnitude_prune(factors: Sequence[Factors], weights: Sequence[float], *, density: float) -> Factors:
    """Return PEFT's `magnitude_prune`: trim each A and each B, then merge them with `factor_linear`.

    The dtype, the device and the errors are those of `factor_linear`.
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
    """Return PEFT's `dare_linear`: drop entries of each A and each B and rescale, then merge them with `factor_linear`.

    The random numbers for an expert's A come from the child "A" of the expert's stream, and those for its B from the
    child "B". The dtype, the device and the errors are those of `factor_linear`.
    """
    return _separately(
        factors,
        weights,
        "factor_dare_linear",
        lambda tensors, roots, part: dare_linear(tensors, roots, density=density, streams=_children(streams, part)),
    )


def factor_ties(factors: Sequence[Factors], weights: Sequence[float], *, density: float) -> Factors:
    """Return PEFT's `ties`: `ties_peft` of the A's and `ties_peft` of the B's.

    The weights are `sign(w_e s_e) sqrt(|w_e s_e|)` for the A's and `sqrt(|w_e s_e|)` for the B's. The A's and the B's
    elect their signs separately, but the sign of an entry of A or B does not determine the sign of any entry of the
    delta. So experts whose deltas agree may cancel, and experts whose deltas disagree may not.

    The dtype, the device and the errors are those of `factor_linear`.
    """
    return _separately(
        factors, weights, "factor_ties", lambda tensors, roots, _part: ties_peft(tensors, roots, density=density)
    )


def factor_dare_ties(
    factors: Sequence[Factors], weights: Sequence[float], *, density: float, streams: Sequence[Stream]
) -> Factors:
    """Return PEFT's `dare_ties`: like `factor_ties`, but with random drops and rescaling instead of trimming.

    The streams are used as in `factor_dare_linear`. The dtype, the device and the errors are those of `factor_linear`.
    """
    return _separately(
        factors,
        weights,
        "factor_dare_ties",
        lambda tensors, roots, part: dare_ties_peft(tensors, roots, density=density, streams=_children(streams, part)),
    )


def cancels(weights: Sequence[float]) -> bool:
    """Return whether the sum of the weights is about 0 in comparison with the sum of their magnitudes."""
    return abs(math.fsum(weights)) <= CANCELLED * math.fsum(abs(weight) for weight in weights)


def _separately(factors: Sequence[Factors], weights: Sequence[float], method: str, merge: _Merge) -> Factors:
    """Merge the A's and the B's separately. The weights of both are the roots of the experts' weights, as in PEFT."""
    # The two roots multiply to w * s, so each expert's own delta keeps its weight. PEFT also splits w * s, not only w.
    _check_same_rank(factors, method)
    signed, roots = linear_coefficients([each.scaling for each in factors], weights)
    return Factors(
        merge([each.a_RI for each in factors], signed, "A"), merge([each.b_OR for each in factors], roots, "B")
    )


def _children(streams: Sequence[Stream], part: str) -> list[Stream]:
    return [stream.child(part) for stream in streams]


def _weighted_sum(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return the weighted sum in the dtype of the tensors. It is computed in float64 and rounded once."""
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
