"""DoRA: magnitudes of the outputs, trained beside the factors, relative to the base (arXiv 2402.09353).

With the base's W, an expert's delta `s B A` and its magnitude m, PEFT has `W' = D (W + s B A)`, where D is m over the
norm of each output's row of `W + s B A`. So `W + sum w_e (W'_e - W) = d W + sum w_e s_e (D_e B_e) A_e`, with
`d = 1 + sum w_e (D_e - 1)`; a plain expert has D = 1.

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

# Elements of the base that are summed at once: 16 MiB in float32.
_BLOCK = 1 << 22


class BaseTensors(Protocol):
    """The tensors of a base by name: a checkpoint's, or a loaded model's."""

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; it is not changed."""


@dataclass(frozen=True, eq=False)
class Dora:
    """The base's tensors under the modules of experts that hold magnitudes.

    `places` has every module's tensor in the base and how the module stands in it.
    """

    bank: ExpertBank
    base: BaseTensors
    places: Mapping[str, tuple[str, Placement]]

    def gains(self, stack: StackedModule) -> dict[int, Tensor]:
        """Return D of each expert that has a magnitude at this module, by its position in the bank, `[O]` in float64.

        Raises:
            InputError: if an output's row of `W + s B A` is zero, so that it has no direction.
            UnsupportedAdapterError: if an expert trained its magnitude on another tensor than the base's.
        """
        found = {}
        for expert, factors in zip(stack.experts, stack.factors, strict=True):
            if (magnitude := self.magnitudes.get((expert, stack.name))) is not None:
                self._check_same(expert, magnitude)
                norms_O = self.norms(stack.name, factors)
                if not bool(norms_O.all()):
                    raise InputError(
                        f"{stack.name}: output {int((norms_O == 0).nonzero()[0])} of the base and the adapter together "
                        "is zero, which has no direction for DoRA to scale",
                        where=str(self.bank.experts[expert].folder),
                        mend="give the base that the expert was trained on, or leave the expert out",
                    )
                value_O = self.bank.experts[expert].adapter.trained_tensor(magnitude.name, torch.float64)
                found[expert] = value_O / norms_O
        return found

    def norms(self, module: str, factors: Factors) -> Tensor:
        """Return `|W + s B A|` of each output, `[O]` in float64 on the CPU; memory: some rows of the base.

        Args:
            module: its name.
            factors: on any device, where the arithmetic is done; in float32, in float64 where the base is.
        """
        tensor, placement = self.places[module]
        base_MN = self.base.tensor(tensor).reshape(placement.matrix_shape)
        kind = arithmetic_dtype(base_MN.dtype)
        a_RI, b_OR = factors.a_RI.to(kind), factors.b_OR.to(kind)
        parts = placement.parts(Factors(a_RI, b_OR))
        num_rows = max(1, _BLOCK // base_MN.shape[1])
        found = []
        for start in range(0, base_MN.shape[0], num_rows):
            # in the base's own dtype to the device: torch would change it on the CPU and transfer twice the bytes
            rows = base_MN[start : start + num_rows].to(a_RI.device).to(kind, copy=True)
            add_parts(rows, parts, factors.scaling, start)
            found.append(squared_norms(rows, placement.output_axis).cpu())
        squared_O = torch.cat(found) if placement.output_axis == 0 else torch.stack(found).sum(dim=0)
        return squared_O.sqrt_()

    @cached_property
    def magnitudes(self) -> Mapping[tuple[int, str], TrainedTensor]:
        """Every magnitude, by its expert's position in the bank and its module."""
        return {
            (index, each.module): each
            for index, expert in enumerate(self.bank.experts)
            for each in expert.adapter.trained.values()
            if each.kind == "magnitude" and each.module is not None
        }

    def _check_same(self, expert: int, magnitude: TrainedTensor) -> None:
        """Raise unless what an expert saved of the magnitude's tensor, if anything, is the base's own."""
        adapter = self.bank.experts[expert].adapter
        base = self.base.tensor(self.places[str(magnitude.module)][0])
        for each in adapter.trained.values():
            if each.kind == "replaced" and each.target == magnitude.target:
                saved = adapter.trained_tensor(each.name, None)
                if not is_same(saved, base):
                    raise UnsupportedAdapterError(
                        f"{each.name} is not the base's {each.target}, and DoRA is trained on top of it: this version "
                        "does not merge the two together",
                        where=str(self.bank.experts[expert].folder),
                        mend="give the base that the expert was trained on, in the dtype of its training",
                    )


def is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers, in whatever dtypes."""
    kind = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(kind), other.to(kind))


def turned(stack: StackedModule, gains: Mapping[int, Tensor]) -> StackedModule:
    """Return a stack with `D_e B_e` in place of each B of an expert that has a magnitude."""
    factors = []
    for expert, each in zip(stack.experts, stack.factors, strict=True):
        if (gain_O := gains.get(expert)) is not None:
            b_OR = each.b_OR * gain_O.to(each.b_OR.device)[:, None]
            each = Factors(each.a_RI, b_OR.to(each.b_OR.dtype), each.scaling)  # noqa: PLW2901
        factors.append(each)
    return replace(stack, factors=tuple(factors))


def unscaled(module: str, factors: Factors, scale_O: Tensor) -> Factors:
    """Return factors with `d^-1 B`: a DoRA adapter multiplies them by d, as it does the base's outputs.

    Args:
        module: its name, for the error.
        factors: of the soup.
        scale_O: d, `[O]` in float64 on the CPU.

    Raises:
        UsageError: where d is about 0, so that no magnitude stands for it.
    """
    least = int(scale_O.abs().argmin())
    if abs(float(scale_O[least])) < CANCELLED:
        raise UsageError(
            f"{module}: the soup takes output {least} of the base {float(scale_O[least]):g} times, which no DoRA "
            "adapter can hold",
            where="weights",
            mend="take weights that do not cancel, or fold the soup into the base model: into_base=BASE",
        )
    b_OR = factors.b_OR.double() / scale_O.to(factors.b_OR.device)[:, None]
    return Factors(factors.a_RI, b_OR.to(factors.b_OR.dtype), factors.scaling)


def base_scale(gains: Mapping[int, Tensor], weights: Mapping[int, float]) -> Tensor:
    """Return `d = 1 + sum w_e (D_e - 1)`: what a soup multiplies the base's outputs by, `[O]` in float64."""
    return torch.stack([weights[expert] * (gain_O - 1) for expert, gain_O in gains.items()]).sum(dim=0) + 1
