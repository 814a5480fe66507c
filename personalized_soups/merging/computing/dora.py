"""DoRA: experts that also train a magnitude for each output of a module (arXiv 2402.09353).

Let W be the base's weight, `s B A` an expert's delta, and m the expert's magnitudes. PEFT computes the adapted weight
`W' = D (W + s B A)`. D is m divided by the norm of each row (output) of `W + s B A`. The soup of experts e with the
weights w_e is then `W + sum w_e (W'_e - W) = d W + sum w_e s_e (D_e B_e) A_e`, with `d = 1 + sum w_e (D_e - 1)`. For an
expert without magnitudes, D = 1.

Shapes: R = rank, I = in_features, O = out_features, M and N = rows and columns of the base's matrix.
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

# The number of elements of the base's matrix whose norms are computed at once. They take 16 MiB in float32.
_BLOCK = 1 << 22


class BaseTensors(Protocol):
    """The tensors of a base model, from a checkpoint or from a loaded model."""

    def tensor(self, name: str) -> Tensor:
        """Return the tensor `name`. The caller must not change it."""


@dataclass(frozen=True, eq=False)
class Dora:
    """The magnitudes of the experts, and the tensors of the base that the experts adapt.

    Attributes:
        bank: the experts.
        base: the base's tensors.
        places: for each module, the name of the tensor in the base and the module's placement in that tensor.
    """

    bank: ExpertBank
    base: BaseTensors
    places: Mapping[str, tuple[str, Placement]]

    def gains(self, stack: StackedModule) -> dict[int, Tensor]:
        """Return D of each expert that has magnitudes for the module of `stack`, by the expert's position in the bank.

        Returns:
            Each D as a vector `[O]` in float64 on the CPU.

        Raises:
            InputError: if a row of `W + s B A` is zero, so that it has no direction.
            UnsupportedAdapterError: if an expert saved its own version of the tensor to which its magnitudes belong.
        """
        gains = {}
        for expert, factors in zip(stack.experts, stack.factors, strict=True):
            if (magnitude := self.magnitudes.get((expert, stack.name))) is not None:
                self._check_same(expert, magnitude)
                # D is computed from the expert's own factors and scaling, not from the soup
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
        """Return the norm of each row (output) of `W + s B A`, as a vector `[O]` in float64 on the CPU.

        Only some rows of the base are in memory at once.

        Args:
            module: the module's name.
            factors: the factors. Their device computes the norms, in float32, or in float64 if the base is float64.
        """
        tensor, placement = self.places[module]
        base_MN = self.base.tensor(tensor).reshape(placement.matrix_shape)
        # the dtype in which a delta is also folded into the base
        kind = arithmetic_dtype(base_MN.dtype)
        a_RI, b_OR = factors.a_RI.to(kind), factors.b_OR.to(kind)
        parts = placement.parts(Factors(a_RI, b_OR))
        # at least one row, even if a row is larger than a block
        num_rows = max(1, _BLOCK // base_MN.shape[1])
        squares = []
        for start in range(0, base_MN.shape[0], num_rows):
            # copied to the device first and converted there, because the base's dtype usually has fewer bytes
            rows = base_MN[start : start + num_rows].to(a_RI.device).to(kind, copy=True)
            add_parts(rows, parts, factors.scaling, start)
            squares.append(squared_norms(rows, placement.output_axis).cpu())
        # if the outputs are rows, each block has other outputs; if they are columns (Conv1D), every block has a part of
        # each output, and the parts add up
        squared_O = torch.cat(squares) if placement.output_axis == 0 else torch.stack(squares).sum(dim=0)
        return squared_O.sqrt_()

    @cached_property
    def magnitudes(self) -> Mapping[tuple[int, str], TrainedTensor]:
        """Every magnitude tensor, by the expert's position in the bank and the module's name."""
        return {
            (index, tensor.module): tensor
            for index, expert in enumerate(self.bank.experts)
            for tensor in expert.adapter.trained.values()
            if tensor.kind == "magnitude" and tensor.module is not None
        }

    def _check_same(self, expert: int, magnitude: TrainedTensor) -> None:
        """Raise an error if the expert saved a changed version of the base's tensor to which `magnitude` belongs."""
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
    """Return whether two tensors have the same shape and hold the same numbers. Their dtypes may differ."""
    # the promoted dtype represents the values of both dtypes exactly
    kind = torch.promote_types(left.dtype, right.dtype)
    return torch.equal(left.to(kind), right.to(kind))


def turned(stack: StackedModule, gains: Mapping[int, Tensor]) -> StackedModule:
    """Return a copy of the stack in which the B of each expert with magnitudes is replaced by `D_e B_e`."""
    factors = []
    for expert, each in zip(stack.experts, stack.factors, strict=True):
        if (gain_O := gains.get(expert)) is not None:
            # scaling the rows of B does not change the rank, and experts that share their A still share it
            b_OR = each.b_OR * gain_O.to(each.b_OR.device)[:, None]
            each = Factors(each.a_RI, b_OR.to(each.b_OR.dtype), each.scaling)  # noqa: PLW2901
        factors.append(each)
    return replace(stack, factors=tuple(factors))


def unscaled(module: str, factors: Factors, scale_O: Tensor) -> Factors:
    """Return the soup's factors with `B / d` in place of B, because a DoRA adapter multiplies all outputs by d.

    Args:
        module: the module's name, which the error shows.
        factors: the soup's factors.
        scale_O: the vector d in float64 on the CPU.

    Raises:
        UsageError: if an element of d is close to 0, so that the division would amplify rounding errors.
    """
    least = int(scale_O.abs().argmin())
    # for a smaller d, 1 / d would amplify the rounding errors of the weights
    if abs(float(scale_O[least])) < CANCELLED:
        raise UsageError(
            f"{module}: the soup multiplies output {least} of the base by {float(scale_O[least]):g}, but a DoRA "
            "adapter cannot express a factor so close to 0",
            where="weights",
            mend="change the weights, or fold the soup into the base model: into_base=BASE",
        )
    # the division is in float64, so B is rounded only once, to the dtype of the factors
    b_OR = factors.b_OR.double() / scale_O.to(factors.b_OR.device)[:, None]
    return Factors(factors.a_RI, b_OR.to(factors.b_OR.dtype), factors.scaling)


def base_scale(gains: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """Return `d = 1 + sum w_e (D_e - 1)`, the factor by which the soup multiplies the base's outputs, in float64."""
    # 1 is added last, because the small differences would lose digits in a sum that starts at 1
    return torch.stack([weights[expert] * (gain_O - 1) for expert, gain_O in gains.items()]).sum(dim=0) + 1
