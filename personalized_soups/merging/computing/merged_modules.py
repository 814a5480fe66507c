"""One module of a merged adapter: rounded to its dtype, with its shapes and names in the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.placement import blocks_of, of_blocks
from personalized_soups.errors import UsageError
from personalized_soups.merging.computing.dora import unscaled
from personalized_soups.merging.computing.module_soups import ModuleSoup
from personalized_soups.merging.planning.layout import Layout
from personalized_soups.merging.planning.plan import MergePlan, torch_dtype
from personalized_soups.merging.planning.vllm import check_vllm_rank
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.finite import all_finite


@dataclass(frozen=True, slots=True)
class Loss:
    """What a truncation lost: squared Frobenius norms of the delta and of what was taken from it."""

    energy: float
    lost: float

    @property
    def relative_error(self) -> float:
        """`|dW - dW_R| / |dW|`; 0 where dW is 0."""
        return (self.lost / self.energy) ** 0.5 if self.energy > 0 else 0.0


@dataclass(frozen=True, eq=False, slots=True)
class MergedModule:
    """One module of a merged adapter, on the CPU in the adapter's dtype.

    `beside` are its other tensors by their names in the file: a magnitude (DoRA), the bias of its B (lora_bias).
    """

    like: LoraModule
    factors: Factors
    loss: Loss
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, soup: ModuleSoup, plan: MergePlan) -> Self:
        """Round a module's soup once to the plan's dtype; at the plan's rank, unless an energy share decides.

        A DoRA adapter has `W' = m / |W + B A| (W + B A)`: with the soup `d W + G` it is `B A = d^-1 G`, truncated
        before it is divided, and `m = d |W + B A|` of the factors as they are written.

        Raises:
            UsageError: where a value does not fit into the dtype, or d is about 0.
        """
        assert soup.factors is not None, "a dense soup is truncated before it is held as an adapter"
        like, factors = soup.module.like, soup.factors
        scale_O = torch.ones(like.out_features, dtype=torch.float64) if soup.scale_O is None else soup.scale_O
        if soup.scale_O is not None:
            factors = unscaled(like.name, factors, scale_O)
        written = Factors(rounded(like.a_name, factors.a_RI, plan), rounded(like.b_name, factors.b_OR, plan))
        shapes = beside_shapes(like, plan.layout)
        values = {}
        if soup.dora is not None:
            values[plan.layout.magnitude_name(like.name)] = scale_O * soup.dora.norms(like.name, written)
        if soup.bias_O is not None:
            values[plan.layout.b_bias_name(like.name)] = soup.bias_O
        beside = {name: rounded(name, value, plan).reshape(shapes[name]) for name, value in values.items()}
        merged = cls(like, written, Loss(soup.energy, soup.lost), beside)
        return merged if plan.energy is not None else merged.padded(plan.rank)

    @property
    def name(self) -> str:
        """The module's name in the base model."""
        return self.like.name

    @property
    def rank(self) -> int:
        """The rank of the change, of each block's where there are several."""
        return self.factors.rank // self.like.blocks

    def padded(self, rank: int) -> Self:
        """Return it at a higher rank: rows and columns of zeros are added, the delta stays the same."""
        if rank <= self.rank:
            return self
        blocks = blocks_of(self.factors, self.like.blocks)
        return replace(self, factors=of_blocks([each.padded(rank) for each in blocks]))

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield both factors, and what stands beside them, by their names in the file and in their shapes there."""
        yield self.like.a_name, self.factors.a_RI.reshape(a_shape(self.like, self.rank))
        yield self.like.b_name, self.factors.b_OR.reshape(b_shape(self.like, self.rank))
        yield from self.beside.items()


def common_ranks(plan: MergePlan, own: Mapping[str, int]) -> dict[str, int]:
    """Return the rank at which each module is written: its own where an energy share decides, one for all for vLLM."""
    if plan.energy is not None and plan.target == "peft":
        return dict(own)
    rank = max(own.values())
    if plan.target == "vllm":
        check_vllm_rank(rank)
    return dict.fromkeys(own, rank)


def a_shape(like: LoraModule, rank: int) -> tuple[int, ...]:
    """Return the shape of a module's A in the file."""
    return (rank * like.blocks, like.in_features // math.prod(like.kernel), *like.kernel)


def b_shape(like: LoraModule, rank: int) -> tuple[int, ...]:
    """Return the shape of a module's B in the file."""
    return (like.out_features, rank * like.blocks, *(1 for _ in like.kernel))


def beside_shapes(like: LoraModule, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what stands beside a module's factors in the file."""
    found: dict[str, tuple[int, ...]] = {}
    if layout.use_dora:
        ones = (1,) * len(like.kernel)
        found[layout.magnitude_name(like.name)] = (*ones[:1], like.out_features, *ones)
    if layout.lora_bias:
        found[layout.b_bias_name(like.name)] = (like.out_features,)
    return found


def rounded(name: str, tensor: Tensor, plan: MergePlan) -> Tensor:
    """Return a tensor of a merged adapter in the plan's dtype, on the CPU and contiguous.

    Raises:
        UsageError: if a value does not fit into the dtype.
    """
    # Rounded before the transfer: truncated factors are float64, four times the bytes of a 16-bit dtype.
    on_cpu = tensor.to(torch_dtype(plan.dtype)).to("cpu").contiguous()
    if not all_finite(on_cpu):
        raise too_large(f"{name}: the soup has values up to {tensor.abs().max().item():g}", plan)
    return on_cpu


def too_large(what: str, plan: MergePlan) -> UsageError:
    """Return the error for values that the plan's dtype cannot represent."""
    return UsageError(
        f"{what}, beyond {plan.dtype}",
        where="dtype",
        mend="take dtype=float32 or bfloat16, or smaller weights",
    )
