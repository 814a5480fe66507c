"""DoRA: trained magnitudes of the outputs, relative to the base (arXiv 2402.09353).

With the base's W, an expert's delta `s B A` and its magnitude m, PEFT computes `W' = D (W + s B A)`, where D is m
divided by the norm of each output's row of `W + s B A`. So `W + sum w_e (W'_e - W) = d W + sum w_e s_e (D_e B_e) A_e`,
with `d = 1 + sum w_e (D_e - 1)`; an expert without a magnitude has D = 1.

O out features, M rows and N columns of a base's matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from personalized_soups.adapters.placement import Placement, add_parts, squared_norms
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.bank.expert_bank import ExpertBank, StackedModule
from personalized_soups.errors import InputError, UnsupportedAdapterError, UsageError
from personalized_soups.merging.computing.blocks import arithmetic_dtype
from personalized_soups.methods.factors import CANCELLED, Factors

# Elements of the base whose norms are computed at once: 16 MiB in float32.
_BLOCK = 1 << 22


class BaseTensors(Protocol):
    """The tensors of a base, by name: those of a checkpoint or of a loaded model."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor. Callers do not change it."""


@dataclass(frozen=True, eq=False)
class Dora:
    """The magnitudes of experts, and the base's tensors that they are relative to.

    Attributes:
        bank: the experts.
        base: the base's tensors.
        places: for each module, the name of its tensor in the base and its placement in that tensor.
    """

    bank: ExpertBank
    base: BaseTensors
    places: Mapping[str, tuple[str, Placement]]

    def gains(self, stack: StackedModule) -> dict[int, Tensor]:
        """Return D of each expert with a magnitude at this module, by the expert's position in the bank.

        Returns:
            `[O]` in float64 on the CPU.

        Raises:
            InputError: if an output's row of `W + s B A` is zero and so has no direction.
            UnsupportedAdapterError: if an expert trained its magnitude on a tensor that is not the base's.
        """
        gains = {}
        for expert, factors in zip(stack.experts, stack.factors, strict=True):
            if (magnitude := self.magnitudes.get((expert, stack.name))) is not None:
                self._check_same(expert, magnitude)
                # the expert's own factors with its own scaling: D belongs to the expert, not to the soup
                norms_O = self.norms(stack.name, factors)
                if not bool(norms_O.all()):
                    raise InputError(
                        f"{stack.name}: all weights of output {int((norms_O == 0).nonzero()[0])} are 0 in the sum of "
                        "the base and the expert's delta, so DoRA has no direction to scale",
                        where=str(self.bank.experts[expert].folder),
                        mend="give the base that the expert was trained on, or leave the expert out",
                    )
                value_O = self.bank.experts[expert].adapter.trained_tensor(magnitude.name, torch.float64)
                gains[expert] = value_O / norms_O
        return gains

    def norms(self, module: str, factors: Factors) -> Tensor:
        """Return the norm `|W + s B A|` of each output, `[O]` in float64 on the CPU. Memory: some rows of the base.

        Args:
            module: the module's name.
            factors: the factors. The arithmetic runs on their device, in float32, or in float64 if the base is float64.
        """
        tensor, placement = self.places[module]
        base_MN = self.base.tensor(tensor).reshape(placement.matrix_shape)
        kind = arithmetic_dtype(base_MN.dtype)
        a_RI, b_OR = factors.a_RI.to(kind), factors.b_OR.to(kind)
        parts = placement.parts(Factors(a_RI, b_OR))
        # at least one row, however long
        num_rows = max(1, _BLOCK // base_MN.shape[1])
        squares = []
        for start in range(0, base_MN.shape[0], num_rows):
            # transferred in the base's dtype, then converted: the other order would transfer twice the bytes
            rows = base_MN[start : start + num_rows].to(a_RI.device).to(kind, copy=True)
            add_parts(rows, parts, factors.scaling, start)
            squares.append(squared_norms(rows, placement.output_axis).cpu())
        # outputs are rows: each block has its own. Outputs are columns (Conv1D): every block has a part of each
        squared_O = torch.cat(squares) if placement.output_axis == 0 else torch.stack(squares).sum(dim=0)
        return squared_O.sqrt_()

    @cached_property
    def magnitudes(self) -> Mapping[tuple[int, str], TrainedTensor]:
        """Every magnitude, by its expert's position in the bank and its module's name."""
        return {
            (index, tensor.module): tensor
            for index, expert in enumerate(self.bank.experts)
            for tensor in expert.adapter.trained.values()
            if tensor.kind == "magnitude" and tensor.module is not None
        }

    def _check_same(self, expert: int, magnitude: TrainedTensor) -> None:
        """Raise if the expert saved another tensor than the base's under its magnitude."""
        adapter = self.bank.experts[expert].adapter
        base = self.base.tensor(self.places[str(magnitude.module)][0])
        for tensor in adapter.trained.values():
            if tensor.kind == "replaced" and tensor.target == magnitude.target:
                saved = adapter.trained_tensor(tensor.name, None)
                if not is_same(saved, base):
                    raise UnsupportedAdapterError(
                        f"the expert's saved tensor {tensor.name} differs from the base's tensor {tensor.target}, and "
                        "the expert's DoRA magnitudes belong to the saved tensor; this version cannot merge such an "
                        "expert",
                        where=str(self.bank.experts[expert].folder),
                        mend="give the base that the expert was trained on, in the dtype that the training used",
                    )


def is_same(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors of any dtypes hold the same numbers."""
    # compared in the wider dtype, in which both are exact
    kind = torch.promote_types(left.dtype, right.dtype)
    return torch.equal(left.to(kind), right.to(kind))


def turned(stack: StackedModule, gains: Mapping[int, Tensor]) -> StackedModule:
    """Return a stack with `D_e B_e` in place of the B of each expert with a magnitude."""
    factors = []
    for expert, each in zip(stack.experts, stack.factors, strict=True):
        if (gain_O := gains.get(expert)) is not None:
            # scaling B's rows keeps the rank and leaves a shared A shared
            b_OR = each.b_OR * gain_O.to(each.b_OR.device)[:, None]
            each = Factors(each.a_RI, b_OR.to(each.b_OR.dtype), each.scaling)  # noqa: PLW2901
        factors.append(each)
    return replace(stack, factors=tuple(factors))


def unscaled(module: str, factors: Factors, scale_O: Tensor) -> Factors:
    """Return the soup's factors with `d^-1 B`, since a DoRA adapter multiplies all outputs by d.

    Args:
        module: the module's name, for the error.
        factors: the soup's factors.
        scale_O: d, `[O]` in float64 on the CPU.

    Raises:
        UsageError: if d is about 0, which no magnitude can express.
    """
    least = int(scale_O.abs().argmin())
    # below this, 1 / d would amplify the rounding of the weights
    if abs(float(scale_O[least])) < CANCELLED:
        raise UsageError(
            f"{module}: the soup multiplies output {least} of the base by {float(scale_O[least]):g}, but a DoRA "
            "adapter cannot express a factor so close to 0",
            where="weights",
            mend="change the weights, or fold the soup into the base model: into_base=BASE",
        )
    # divided in float64, so that the one rounding is that to the factors' dtype
    b_OR = factors.b_OR.double() / scale_O.to(factors.b_OR.device)[:, None]
    return Factors(factors.a_RI, b_OR.to(factors.b_OR.dtype), factors.scaling)


def base_scale(gains: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """Return the factor of the base's outputs in a soup, `d = 1 + sum w_e (D_e - 1)`, `[O]` in float64."""
    # 1 is added last: the differences are small, and would lose digits in a sum that starts at 1
    return torch.stack([weights[expert] * (gain_O - 1) for expert, gain_O in gains.items()]).sum(dim=0) + 1
