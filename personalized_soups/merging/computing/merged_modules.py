"""One module of a merged adapter. Its tensors are rounded to the adapter's dtype and have the file's names and shapes.

Shapes: R = rank, I = in_features, O = out_features.
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
        energy: the squared Frobenius norm of the soup's delta; 0 if nothing is truncated.
        lost: the squared Frobenius norm of the difference between the delta and the truncated delta.
    """

    energy: float
    lost: float

    @property
    def relative_error(self) -> float:
        """The error relative to the delta, in the Frobenius norm: `sqrt(lost / energy)`. It is 0 if the delta is 0."""
        return (self.lost / self.energy) ** 0.5 if self.energy > 0 else 0.0


@dataclass(frozen=True, eq=False, slots=True)
class MergedModule:
    """One module of a merged adapter, on the CPU in the adapter's dtype.

    Attributes:
        like: the planned module, with the names that the factors have in the file.
        factors: the factors A and B. Their scaling is 1.
        loss: the error of the truncation.
        extras: the other tensors of the module (DoRA's magnitude and the bias of B), by their names in the file.
    """

    like: LoraModule
    factors: Factors
    loss: Loss
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, soup: ModuleSoup, plan: MergePlan) -> Self:
        """Return the module of the merged adapter for one module's soup, rounded once to the plan's dtype.

        The factors are padded to the plan's rank, unless the plan has an energy share.

        A DoRA adapter computes `W' = m / |W + B A| (W + B A)`, with one norm for each row (arXiv 2402.09353). So that
        W' is the soup `d W + G`, the adapter needs `B A = G / d` and `m = d |W + B A|`. G is truncated before the
        division. m is computed from the rounded factors, so that their rounding does not change the norm of W'.

        Raises:
            UsageError: if a value does not fit into the dtype, or an element of d is close to 0.
        """
        assert soup.factors is not None, "a dense soup must be truncated before it becomes an adapter"
        like, factors = soup.module.like, soup.factors
        scale_O = torch.ones(like.out_features, dtype=torch.float64) if soup.scale_O is None else soup.scale_O
        # G is already truncated, so the error in soup.json is that of G and not that of G / d
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
        """The rank of the module, or of each block if the module has several blocks."""
        return self.factors.rank // self.like.blocks

    def padded(self, rank: int) -> Self:
        """Return the module with the factors padded with zeros to a higher rank. The delta does not change.

        If `rank` is not higher than the module's rank, the module itself is returned.
        """
        if rank <= self.rank:
            return self
        # each block is padded on its own, because the columns of the blocks' B's are interleaved
        blocks = blocks_of(self.factors, self.like.blocks)
        return replace(self, factors=of_blocks([block.padded(rank) for block in blocks]))

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each tensor in the file, and the tensor in the shape that the file needs."""
        yield self.like.a_name, self.factors.a_RI.reshape(a_shape(self.like, self.rank))
        yield self.like.b_name, self.factors.b_OR.reshape(b_shape(self.like, self.rank))
        yield from self.extras.items()


def common_ranks(plan: MergePlan, own: Mapping[str, int]) -> dict[str, int]:
    """Return the rank with which each module is written, by the module's name.

    Each module keeps its own rank if the plan has an energy share and the target is `peft`. Otherwise all modules get
    the highest rank.

    Args:
        plan: the plan of the merge.
        own: the rank of each module before padding, by the module's name.

    Raises:
        UsageError: if the target is `vllm`, and vLLM cannot load the highest rank.
    """
    if plan.energy is not None and plan.target == "peft":
        return dict(own)
    # one rank for all modules, so that vLLM needs no rank_pattern; padding with zeros adds bytes, but no error
    rank = max(own.values())
    if plan.target == "vllm":
        check_vllm_rank(rank)
    return dict.fromkeys(own, rank)


def a_shape(like: LoraModule, rank: int) -> tuple[int, ...]:
    """Return the shape of a module's A in the file."""
    # in a convolution A covers the whole kernel, and B is a 1x1 convolution (peft/tuners/lora/layer.py)
    return (rank * like.blocks, like.in_features // math.prod(like.kernel), *like.kernel)


def b_shape(like: LoraModule, rank: int) -> tuple[int, ...]:
    """Return the shape of a module's B in the file."""
    return (like.out_features, rank * like.blocks, *(1 for _ in like.kernel))


def extra_shapes(like: LoraModule, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a module has besides its factors, by the tensors' names."""
    shapes: dict[str, tuple[int, ...]] = {}
    if layout.use_dora:
        # PEFT stores a convolution's magnitude as [1, O, 1, ...], so that it multiplies the outputs by broadcasting
        ones = (1,) * len(like.kernel)
        shapes[layout.magnitude_name(like.name)] = (*ones[:1], like.out_features, *ones)
    if layout.lora_bias:
        shapes[layout.b_bias_name(like.name)] = (like.out_features,)
    return shapes


def rounded(name: str, tensor: Tensor, plan: MergePlan) -> Tensor:
    """Return a tensor of a merged adapter in the plan's dtype, as a contiguous tensor on the CPU.

    Args:
        name: the tensor's name, which the error shows.
        tensor: the tensor, on any device.
        plan: the plan of the merge.

    Raises:
        UsageError: if a value does not fit into the dtype.
    """
    # rounded before the copy from a GPU: truncated factors are float64, with four times the bytes of a 16-bit dtype
    on_cpu = tensor.to(torch_dtype(plan.dtype)).to("cpu").contiguous()
    # float16 ends at 65504, and torch turns larger values into infinity without an error
    if not all_finite(on_cpu):
        raise too_large(f"{name}: the soup has values up to {tensor.abs().max().item():g}", plan)
    return on_cpu


def too_large(what: str, plan: MergePlan) -> UsageError:
    """Return the error for values that the plan's dtype cannot represent. `what` begins the error's message."""
    return UsageError(
        f"{what}, beyond the range of {plan.dtype}",
        where="dtype",
        mend="use dtype=float32 or dtype=bfloat16, or smaller weights",
    )
