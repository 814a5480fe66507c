"""One module of a merged adapter: its tensors rounded to the adapter's dtype, with their names and shapes in the file.

R rank, I in features, O out features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.placement import blocks_of, of_blocks
from personalized_soups.devices import torch_dtype
from personalized_soups.errors import UsageError
from personalized_soups.merging.computing.dora import unscaled
from personalized_soups.merging.computing.module_soups import ModuleSoup
from personalized_soups.merging.planning.layout import Layout
from personalized_soups.merging.planning.plan import MergePlan
from personalized_soups.merging.planning.vllm import check_vllm_rank
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.finite import all_finite


@dataclass(frozen=True, slots=True)
class Loss:
    """The error of a truncation.

    Attributes:
        energy: the squared Frobenius norm of the delta; 0 if nothing is truncated.
        lost: the squared Frobenius norm of the difference to the truncated delta.
    """

    energy: float
    lost: float

    @property
    def relative_error(self) -> float:
        """The relative error `|dW - dW_R| / |dW|` in the Frobenius norm; 0 if dW is 0."""
        return (self.lost / self.energy) ** 0.5 if self.energy > 0 else 0.0


@dataclass(frozen=True, eq=False, slots=True)
class MergedModule:
    """One module of a merged adapter, on the CPU in the adapter's dtype.

    Attributes:
        like: the module, with the names of its factors in the file.
        factors: A and B; the scaling is 1.
        loss: the error of the truncation.
        extras: the module's other tensors, by their names in the file: DoRA's magnitude and the bias of B (lora_bias).
    """

    like: LoraModule
    factors: Factors
    loss: Loss
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, soup: ModuleSoup, plan: MergePlan) -> Self:
        """Round a module's soup once to the plan's dtype, and pad it to the plan's rank unless an energy share decides.

        A DoRA adapter computes `W' = m / |W + B A| (W + B A)`, with the norm of each output's row (arXiv 2402.09353).
        For the soup `d W + G` that gives `B A = d^-1 G` and `m = d |W + B A|`. G is truncated before the division,
        and m is computed from the factors as they are written, so that their rounding does not change W'.

        Raises:
            UsageError: if a value does not fit into the dtype, or d is about 0.
        """
        assert soup.factors is not None, "a dense soup must be truncated before it becomes an adapter"
        like, factors = soup.module.like, soup.factors
        scale_O = torch.ones(like.out_features, dtype=torch.float64) if soup.scale_O is None else soup.scale_O
        # truncated first: the error that soup.json records is that of G, not of d^-1 G
        if soup.scale_O is not None:
            factors = unscaled(like.name, factors, scale_O)
        written = Factors(rounded(like.a_name, factors.a_RI, plan), rounded(like.b_name, factors.b_OR, plan))
        shapes = extra_shapes(like, plan.layout)
        values = {}
        if soup.dora is not None:
            values[plan.layout.magnitude_name(like.name)] = scale_O * soup.dora.norms(like.name, written)
        if soup.bias_O is not None:
            values[plan.layout.b_bias_name(like.name)] = soup.bias_O
        extras = {name: rounded(name, value, plan).reshape(shapes[name]) for name, value in values.items()}
        merged = cls(like, written, Loss(soup.energy, soup.lost), extras)
        # one rank for all modules, so that most adapters need no rank_pattern
        return merged if plan.energy is not None else merged.padded(plan.rank)

    @property
    def name(self) -> str:
        """The module's name in the base model."""
        return self.like.name

    @property
    def rank(self) -> int:
        """The rank; if the module has several blocks, the rank of each block."""
        return self.factors.rank // self.like.blocks

    def padded(self, rank: int) -> Self:
        """Return the module at a higher rank, with rows and columns of zeros; the delta stays the same."""
        if rank <= self.rank:
            return self
        # zeros go into each block, since the blocks' columns of B are interleaved
        blocks = blocks_of(self.factors, self.like.blocks)
        return replace(self, factors=of_blocks([block.padded(rank) for block in blocks]))

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the factors and the extras, with their names and shapes in the file."""
        yield self.like.a_name, self.factors.a_RI.reshape(a_shape(self.like, self.rank))
        yield self.like.b_name, self.factors.b_OR.reshape(b_shape(self.like, self.rank))
        yield from self.extras.items()


def common_ranks(plan: MergePlan, own: Mapping[str, int]) -> dict[str, int]:
    """Return the rank at which each module is written.

    Args:
        plan: the plan of the merge.
        own: each module's own rank. It is kept if an energy share decides the ranks and PEFT loads the adapter.

    Raises:
        UsageError: if the adapter is for vLLM, and vLLM cannot load the highest rank.
    """
    if plan.energy is not None and plan.target == "peft":
        return dict(own)
    # one rank for all modules, so that an adapter for vLLM needs no rank_pattern
    # padding with zeros costs bytes but no error
    rank = max(own.values())
    if plan.target == "vllm":
        check_vllm_rank(rank)
    return dict.fromkeys(own, rank)


def a_shape(like: LoraModule, rank: int) -> tuple[int, ...]:
    """Return the shape of a module's A in the file."""
    # a convolution's A covers the whole kernel, its B is 1x1 (peft/tuners/lora/layer.py)
    return (rank * like.blocks, like.in_features // math.prod(like.kernel), *like.kernel)


def b_shape(like: LoraModule, rank: int) -> tuple[int, ...]:
    """Return the shape of a module's B in the file."""
    return (like.out_features, rank * like.blocks, *(1 for _ in like.kernel))


def extra_shapes(like: LoraModule, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a module's tensors in addition to its factors."""
    shapes: dict[str, tuple[int, ...]] = {}
    if layout.use_dora:
        # PEFT keeps a convolution's magnitude as [1, O, 1, ...], to multiply outputs by broadcasting
        ones = (1,) * len(like.kernel)
        shapes[layout.magnitude_name(like.name)] = (*ones[:1], like.out_features, *ones)
    if layout.lora_bias:
        shapes[layout.b_bias_name(like.name)] = (like.out_features,)
    return shapes


def rounded(name: str, tensor: Tensor, plan: MergePlan) -> Tensor:
    """Return a tensor of a merged adapter in the plan's dtype, on the CPU and contiguous.

    Raises:
        UsageError: if a value does not fit into the dtype.
    """
    # Rounded before the transfer: truncated factors are float64, four times the bytes of a 16-bit dtype.
    on_cpu = tensor.to(torch_dtype(plan.dtype)).to("cpu").contiguous()
    # float16 ends at 65504, and torch turns larger values into infinity without an error
    if not all_finite(on_cpu):
        raise too_large(f"{name}: the soup has values up to {tensor.abs().max().item():g}", plan)
    return on_cpu


def too_large(what: str, plan: MergePlan) -> UsageError:
    """Return the error for values that the plan's dtype cannot represent."""
    return UsageError(
        f"{what}, beyond the range of {plan.dtype}",
        where="dtype",
        mend="use dtype=float32 or dtype=bfloat16, or smaller weights",
    )
