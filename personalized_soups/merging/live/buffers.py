"""The buffers of a live soup. All modules are in one buffer, so that one product sets all of them.

Shapes: E = number of experts, K = rank of the live adapter, O = out_features (in `pristine_OK`, the sum over all
modules), I = in_features, P = number of elements of all A's (or all B's) of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Tensor

from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.errors import UsageError
from personalized_soups.merging.live.products import ColumnScale, Product, RowSum, total_bytes
from personalized_soups.merging.planning.plan import PlannedModule
from personalized_soups.methods.factors import Factors

Shape = tuple[int, int]

# The length of the rows of a RowSum is a multiple of 16 numbers (64 bytes), so that the kernel can read 16 bytes at a
# time.
_ROW_UNIT = 16


@dataclass(frozen=True, eq=False, slots=True)
class LiveBuffers:
    """The tensors of a live soup, and the products that set them.

    Attributes:
        factors: the factors of each module with scaling 1, by the module's name. They are views of the products'
            buffers, except for A's that never change.
        products: the products that set the factors.
        coefficients: a function that takes the experts' weights and returns, for each product, one coefficient per
            expert.
        num_bytes: the number of bytes of all tensors.
    """

    factors: Mapping[str, Factors]
    products: tuple[Product, ...]
    coefficients: Callable[[Sequence[float]], Sequence[Sequence[float]]]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FactorRule:
    """A method that sums the experts' A's and B's separately, as fixed terms and coefficients.

    Each term depends only on the expert. Each coefficient depends only on the weights.

    Attributes:
        a: a function that returns an expert's fixed term in the sum of the A's.
        b: a function that returns an expert's fixed term in the sum of the B's.
        coefficients: a function that takes the weights and returns one coefficient per expert for the A's and one for
            the B's.
    """

    a: Callable[[Factors], Tensor]
    b: Callable[[Factors], Tensor]
    coefficients: Callable[[Sequence[float]], Sequence[Sequence[float]]]


# The formulas of methods/factors.py. The fixed terms include the scalings, so that `set` needs only the weights.
FACTOR_RULES: Mapping[str, FactorRule] = MappingProxyType({
    "factor_average": FactorRule(
        a=lambda factors: factors.a_RI,
        b=lambda factors: factors.b_OR.double() * factors.scaling,
        coefficients=lambda weights: ([weight / math.fsum(weights) for weight in weights], weights),
    ),
    "factor_linear": FactorRule(
        a=lambda factors: factors.a_RI.double() * _signed_root(factors.scaling),
        b=lambda factors: factors.b_OR.double() * abs(factors.scaling) ** 0.5,
        coefficients=lambda weights: ([_signed_root(w) for w in weights], [abs(w) ** 0.5 for w in weights]),
    ),
})  # fmt: skip


def free_buffers(
    bank: ExpertBank, modules: Sequence[PlannedModule], dtype: torch.dtype, *, device: torch.device
) -> LiveBuffers:
    """Return the buffers for `linear` if the experts have different A's. The A's are fixed, and B's columns are scaled.

    All modules have the same rank K, so that the B's of all modules are rows of one buffer. Each expert has as many
    columns as its highest rank. A column is zero if it is above the expert's rank in a module, or if the expert does
    not adapt the module. The fixed B's include the scalings.

    Raises:
        InputError: if an expert contains NaN or infinity.
        UsageError: if an A does not fit into `dtype`.
    """
    ranks = [max(module.rank for module in expert.adapter.modules.values()) for expert in bank.experts]
    starts = list(accumulate(ranks, initial=0))
    heights = [module.out_features for module in modules]
    pristine_OK = torch.empty(sum(heights), starts[-1], device=device)
    a_stacks = [torch.zeros(starts[-1], module.in_features) for module in modules]
    for module, a_KI, part_OK in zip(modules, a_stacks, pristine_OK.split(heights), strict=True):
        b_OK = torch.zeros(module.out_features, starts[-1])
        for index in bank.members(module.name):
            factors = bank.factors(index, module.name)
            columns = slice(starts[index], starts[index] + factors.rank)
            a_KI[columns] = factors.a_RI
            b_OK[:, columns] = factors.b_OR.double() * factors.scaling
        part_OK.copy_(b_OK)
    product = ColumnScale(pristine_OK, ranks, dtype)
    return _with_fixed_a(modules, a_stacks, product.live.split(heights), product)


def shared_buffers(
    bank: ExpertBank, modules: Sequence[PlannedModule], rank: int, dtype: torch.dtype, *, device: torch.device
) -> LiveBuffers:
    """Return the buffers for `linear` if the experts share their A's. The A's are fixed, and the B's are summed.

    The fixed B's include the scalings. Modules of a lower rank are padded with zeros, as in a merged adapter.

    Raises:
        InputError: if an expert contains NaN or infinity.
        UsageError: if an A does not fit into `dtype`.
    """
    shapes = _b_shapes(modules, rank)
    rows_EP = _expert_rows(bank, modules, shapes, lambda factors: factors.b_OR.double() * factors.scaling, device)
    product = RowSum(rows_EP, dtype)
    a_stacks = [torch.zeros(rank, module.in_features) for module in modules]
    for module, a_KI in zip(modules, a_stacks, strict=True):
        factors = bank.factors(0, module.name)
        a_KI[: factors.rank] = factors.a_RI
    return _with_fixed_a(modules, a_stacks, _views(product.live, shapes), product)


def factor_buffers(
    bank: ExpertBank,
    modules: Sequence[PlannedModule],
    rank: int,
    rule: FactorRule,
    dtype: torch.dtype,
    *,
    device: torch.device,
) -> LiveBuffers:
    """Return the buffers for a method that sums the A's and the B's separately.

    There is one buffer and one product for the A's, and one of each for the B's.

    Raises:
        InputError: if an expert contains NaN or infinity.
    """
    a_shapes, b_shapes = [(rank, module.in_features) for module in modules], _b_shapes(modules, rank)
    a_product = RowSum(_expert_rows(bank, modules, a_shapes, rule.a, device), dtype)
    b_product = RowSum(_expert_rows(bank, modules, b_shapes, rule.b, device), dtype)
    pairs = zip(_views(a_product.live, a_shapes), _views(b_product.live, b_shapes), strict=True)
    factors = {module.name: Factors(a_KI, b_OK) for module, (a_KI, b_OK) in zip(modules, pairs, strict=True)}
    num_bytes = a_product.num_bytes + b_product.num_bytes
    return LiveBuffers(factors, (a_product, b_product), rule.coefficients, num_bytes)


def check_fits(largest: float, dtype: torch.dtype) -> None:
    """Check that `dtype` can hold values of the magnitude `largest`.

    Raises:
        UsageError: if `largest` is NaN or greater than the largest number of the dtype.
    """
    if not largest <= torch.finfo(dtype).max:
        raise UsageError(
            f"the soup may have values up to {largest:g}, beyond {str(dtype).removeprefix('torch.')}, "
            f"whose largest value is {torch.finfo(dtype).max:g}",
            where="dtype",
            mend="use dtype='float32' or dtype='bfloat16', or use smaller weights",
        )


def _with_fixed_a(
    modules: Sequence[PlannedModule], a_stacks: Sequence[Tensor], b_views: Sequence[Tensor], product: Product
) -> LiveBuffers:
    for a_KI in a_stacks:
        check_fits(a_KI.abs().max().item(), product.live.dtype)
    rounded = [a_KI.to(product.live.dtype).to(product.live.device) for a_KI in a_stacks]
    factors = {module.name: Factors(a_KI, b_OK) for module, a_KI, b_OK in zip(modules, rounded, b_views, strict=True)}
    return LiveBuffers(factors, (product,), lambda weights: (weights,), product.num_bytes + total_bytes(*rounded))


def _expert_rows(
    bank: ExpertBank,
    modules: Sequence[PlannedModule],
    shapes: Sequence[Shape],
    part: Callable[[Factors], Tensor],
    device: torch.device,
) -> Tensor:
    """Return experts_EP in float32. Row e contains `part` of the factors of every module of expert e.

    The elements of modules that an expert does not adapt are zero. Zeros at the end of each row make its length a
    multiple of _ROW_UNIT.
    """
    num_values = sum(map(math.prod, shapes))
    rows_EP = torch.zeros(len(bank.experts), num_values + -num_values % _ROW_UNIT, device=device)
    for index, expert in enumerate(bank.experts):
        # the row is assembled on the CPU, so that a GPU receives one copy per expert instead of one per module
        row_P = rows_EP[index] if device.type == "cpu" else torch.zeros(rows_EP.shape[1])
        for module, target in zip(modules, _views(row_P, shapes), strict=True):
            if module.name in expert.adapter.modules:
                values = part(bank.factors(index, module.name))
                target[: values.shape[0], : values.shape[1]] = values
        if device.type != "cpu":
            rows_EP[index] = row_P
    return rows_EP


def _views(values_P: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    """Split the start of a vector into consecutive matrices with the given shapes.

    The matrices are views of the vector, not copies.
    """
    sizes = [math.prod(shape) for shape in shapes]
    parts = values_P[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _b_shapes(modules: Sequence[PlannedModule], rank: int) -> list[Shape]:
    return [(module.out_features, rank) for module in modules]


def _signed_root(value: float) -> float:
    return math.copysign(abs(value) ** 0.5, value)
