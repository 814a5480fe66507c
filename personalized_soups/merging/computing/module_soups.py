"""Compute soups module by module. Memory: the modules in use.

R rank, I in features, O out features, E experts, U users.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from personalized_soups.adapters.placement import blocks_of, of_blocks
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.bank.expert_bank import ExpertBank, StackedModule
from personalized_soups.launching.threads import in_order, num_workers
from personalized_soups.merging.computing.applied_method import AppliedMethod
from personalized_soups.merging.computing.dora import Dora, base_scale, turned
from personalized_soups.merging.planning.plan import MergePlan, PlannedModule
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.lowrank import Truncated, decompose, truncate
from personalized_soups.methods.rangefinder import approximate
from personalized_soups.methods.streams import Stream

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False, slots=True)
class ModuleSoup:
    """One module's soup, as factors or as a dense delta.

    Attributes:
        module: the planned module.
        factors: the soup's factors, with scaling 1; None if the method returns a dense delta. The blocks of a
            mixture-of-experts parameter are interleaved, as PEFT stores them.
        delta_OI: the dense delta, or None. The blocks of a mixture-of-experts parameter are its first axis.
        energy: the squared Frobenius norm of the delta; 0 if nothing is truncated.
        lost: the squared Frobenius norm of the truncated part; 0 if nothing is truncated.
        scale_O: the factor of the base's outputs if experts have magnitudes (DoRA), in float64 on the CPU; else None.
        bias_O: the merged adapter's lora_bias, `sum w_e s_e b_e` in float64; None if no expert has one.
        dora: computes the magnitude of a merged adapter; None if the module needs none.
    """

    module: PlannedModule
    factors: Factors | None
    delta_OI: Tensor | None = None  # noqa: N815
    energy: float = 0.0
    lost: float = 0.0
    scale_O: Tensor | None = None  # noqa: N815
    bias_O: Tensor | None = None  # noqa: N815
    dora: Dora | None = None


@dataclass(frozen=True, eq=False)
class Soups:
    """The soups of one or many users over the same experts, on the bank's device. Modules are computed one by one.

    Attributes:
        plans: the users' plans. They differ only in their profiles and weights, so each module is read once for all.
        bank: the experts.
        dora: the experts' magnitudes and the base; None if no expert has a magnitude.
    """

    plans: Sequence[MergePlan]
    bank: ExpertBank
    dora: Dora | None = None
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def plan(self) -> MergePlan:
        """The first plan, for the choices that all plans share."""
        return self.plans[0]

    def each(self, finish: Callable[[list[ModuleSoup]], Result]) -> Iterator[Result]:
        """Yield `finish(soups)` for every module, in the plan's order. On a CPU, several threads compute."""
        self.prepare()
        return in_order(lambda module: finish(self.of(module)), self.plan.modules, num_workers(self.bank.device))

    def prepare(self) -> None:
        """Compute the values that all modules need, so that threads do not compute them twice."""
        self.method.prepare()

    @cached_property
    def method(self) -> AppliedMethod:
        """The merge method, applied to the experts of the bank."""
        return AppliedMethod(self.plans, self.bank)

    def of(self, module: PlannedModule) -> list[ModuleSoup]:
        """Return one module's soup for each plan, in float32; truncated factors are float64.

        Raises:
            InputError: if an expert holds NaN or infinity; it names the file and the tensor. Also as Dora.gains.
            UnsupportedAdapterError: as Dora.gains.
        """
        stack = self.bank.read(module.name)
        with self._one_at_a_time():
            return self._of_read(module, stack)

    def _one_at_a_time(self) -> AbstractContextManager[object]:
        """Return the lock for a GPU, where several modules at once would need more memory and save no time."""
        return nullcontext() if self.bank.device.type == "cpu" else self._turn

    def _of_read(self, module: PlannedModule, stack: StackedModule) -> list[ModuleSoup]:
        if module.like.blocks > 1:
            # each block of a mixture-of-experts parameter is a matrix with a low-rank change of its own
            blocks = [self._of_stack(module, each) for each in _blocks(stack, module.like.blocks)]
            return [_joined(module, soups) for soups in zip(*blocks, strict=True)]
        # gains need the expert's own stack, before any B is scaled
        gains = {} if self.dora is None else self.dora.gains(stack)
        soups = self._of_stack(module, turned(stack, gains) if gains else stack)
        if self.plan.layout.is_plain:
            return soups
        return [self._completed(soup, plan, gains) for soup, plan in zip(soups, self.plans, strict=True)]

    def _completed(self, soup: ModuleSoup, plan: MergePlan, gains: Mapping[int, Tensor]) -> ModuleSoup:
        """Return a module's soup with the values in addition to its factors: DoRA's scale and the lora_bias."""
        weights = dict(enumerate(plan.weights))
        scale_O = base_scale(gains, weights) if gains else None
        bias_O = None
        if plan.layout.lora_bias:
            # an expert without a bias contributes zero, so every module gets one
            bias_O = torch.zeros(soup.module.out_features, dtype=torch.float64)
            for expert, bias in self._biases.get(soup.module.name, ()):
                value_O = self.bank.experts[expert].adapter.trained_tensor(bias.name, torch.float64)
                # PEFT adds the bias to B's output, so the scaling applies to it as well
                bias_O.add_(value_O, alpha=weights[expert] * bias.scaling)
        return replace(soup, scale_O=scale_O, bias_O=bias_O, dora=self.dora)

    @cached_property
    def _biases(self) -> Mapping[str, list[tuple[int, TrainedTensor]]]:
        """Every lora_bias with its expert's position in the bank, by the module's name."""
        biases: dict[str, list[tuple[int, TrainedTensor]]] = {}
        for index, expert in enumerate(self.bank.experts):
            for tensor in expert.adapter.trained.values():
                if tensor.kind == "added" and tensor.module is not None:
                    biases.setdefault(tensor.module, []).append((index, tensor))
        return biases

    def _of_stack(self, module: PlannedModule, stack: StackedModule) -> list[ModuleSoup]:
        # an expert that does not adapt this module has no factors in the stack
        weights = [[plan.weights[index] for index in stack.experts] for plan in self.plans]
        if self.plan.method.family == "dense":
            return [self._of_dense(module, self.method.delta(module, stack, each)) for each in weights]
        if self.plan.encoding != "truncated":
            return [ModuleSoup(module, factors) for factors in self.method.factors(module, stack, weights)]
        if self.plan.method.family == "linear":
            # the decomposition does not depend on the weights, so all users share it
            decomposition = decompose(stack.factors, basis=stack.basis)
            return [_truncated(module, decomposition.truncate(each, **self._cut(module))) for each in weights]
        every = self.method.factors(module, stack, weights)
        return [_truncated(module, truncate(factors, **self._cut(module))) for factors in every]

    def _of_dense(self, module: PlannedModule, delta_OI: Tensor) -> ModuleSoup:
        if self.plan.encoding == "folded":
            return ModuleSoup(module, None, delta_OI)
        # the range finder is random; a fixed seed makes the bytes reproducible
        stream = Stream.of(0, module.name, "range finder")
        return _truncated(module, approximate(delta_OI, **self._cut(module), stream=stream))

    def _cut(self, module: PlannedModule) -> Mapping[str, Any]:
        return {"rank": module.rank} if self.plan.energy is None else {"energy": self.plan.energy}


def _blocks(stack: StackedModule, count: int) -> list[StackedModule]:
    """Return one stack for each block. Experts that share A share it in every block, so `basis` stays the same."""
    parts = zip(*(blocks_of(factors, count) for factors in stack.factors), strict=True)
    # the block's number is part of the name, so that random methods drop other entries in each block
    return [replace(stack, name=f"{stack.name}[{number}]", factors=factors) for number, factors in enumerate(parts)]


def _joined(module: PlannedModule, blocks: Sequence[ModuleSoup]) -> ModuleSoup:
    """Return a module's soup from its blocks' soups."""
    # squared norms of disjoint blocks add up
    energy, lost = sum(block.energy for block in blocks), sum(block.lost for block in blocks)
    deltas = [block.delta_OI for block in blocks if block.delta_OI is not None]
    if deltas:
        return ModuleSoup(module, None, torch.stack(deltas), energy, lost)
    # an energy share may give the blocks different ranks, but PEFT stores one rank for all
    factors = [block.factors for block in blocks if block.factors is not None]
    rank = max(each.rank for each in factors)
    return ModuleSoup(module, of_blocks([each.padded(rank) for each in factors]), None, energy, lost)


def _truncated(module: PlannedModule, truncated: Truncated) -> ModuleSoup:
    return ModuleSoup(module, truncated.factors, None, truncated.energy, truncated.lost)
