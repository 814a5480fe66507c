"""Soups, module by module: what the plan's method makes of the experts' factors. Memory: the modules in work.

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
    """One module's soup: as `factors` with scaling 1, or as `delta_OI` where its method has a dense result.

    A mixture's blocks are laid into one another in `factors`, as PEFT has them, and a first axis of `delta_OI`. Where
    experts hold magnitudes (DoRA), the base's outputs are multiplied by `scale_O` (float64, on the CPU) as well.

    A merged adapter's lora_bias is `bias_O`, `sum w_e s_e b_e` in float64. `dora` is there where an adapter needs a
    magnitude for this module.

    `energy` and `lost` are the squared Frobenius norms of the delta and of what truncation took from it; both are 0
    where nothing is truncated.
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
    """The soups of one or many users over the same experts, on the bank's device, computed as they are asked for.

    `plans` differ in their profiles and weights alone: what is the same for all of them is done once a module. `dora`
    is needed where experts hold magnitudes, which mean nothing without the base.
    """

    plans: Sequence[MergePlan]
    bank: ExpertBank
    dora: Dora | None = None
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def plan(self) -> MergePlan:
        """What all plans have in common."""
        return self.plans[0]

    def each(self, finish: Callable[[list[ModuleSoup]], Result]) -> Iterator[Result]:
        """Yield `finish(soups)` of every module in the plan's order; on several threads where the device is a CPU."""
        self.prepare()
        return in_order(lambda module: finish(self.of(module)), self.plan.modules, num_workers(self.bank.device))

    def prepare(self) -> None:
        """Compute what all modules need, before several threads ask for it."""
        self.method.prepare()

    @cached_property
    def method(self) -> AppliedMethod:
        """The merge method, applied to the experts of the bank."""
        return AppliedMethod(self.plans, self.bank)

    def of(self, module: PlannedModule) -> list[ModuleSoup]:
        """Return one module's soup of each plan: dense or factors in float32; truncated ones are float64.

        Raises:
            InputError: naming file and tensor where an expert holds NaN or infinity; as Dora.gains.
        """
        stack = self.bank.read(module.name)
        with self._one_at_a_time():
            return self._of_read(module, stack)

    def _one_at_a_time(self) -> AbstractContextManager[object]:
        """Several modules at once on a GPU would take several times the memory and no less time."""
        return nullcontext() if self.bank.device.type == "cpu" else self._turn

    def _of_read(self, module: PlannedModule, stack: StackedModule) -> list[ModuleSoup]:
        if module.like.blocks > 1:
            # a mixture of experts has a low-rank change in each of its blocks, of all soups or of none
            blocks = [self._of_stack(module, each) for each in _blocks(stack, module.like.blocks)]
            return [_joined(module, soups) for soups in zip(*blocks, strict=True)]
        gains = {} if self.dora is None else self.dora.gains(stack)
        soups = self._of_stack(module, turned(stack, gains) if gains else stack)
        if self.plan.layout.is_plain:
            return soups
        return [self._completed(soup, plan, gains) for soup, plan in zip(soups, self.plans, strict=True)]

    def _completed(self, soup: ModuleSoup, plan: MergePlan, gains: Mapping[int, Tensor]) -> ModuleSoup:
        """Return a module's soup with what stands beside its factors."""
        weights = dict(enumerate(plan.weights))
        scale_O = base_scale(gains, weights) if gains else None
        bias_O = None
        if plan.layout.lora_bias:
            bias_O = torch.zeros(soup.module.out_features, dtype=torch.float64)
            for expert, each in self._biases.get(soup.module.name, ()):
                value = self.bank.experts[expert].adapter.trained_tensor(each.name, torch.float64)
                bias_O.add_(value, alpha=weights[expert] * each.scaling)
        return replace(soup, scale_O=scale_O, bias_O=bias_O, dora=self.dora)

    @cached_property
    def _biases(self) -> Mapping[str, list[tuple[int, TrainedTensor]]]:
        """Every lora_bias, by its module, with the expert's position in the bank."""
        found: dict[str, list[tuple[int, TrainedTensor]]] = {}
        for index, expert in enumerate(self.bank.experts):
            for each in expert.adapter.trained.values():
                if each.kind == "added" and each.module is not None:
                    found.setdefault(each.module, []).append((index, each))
        return found

    def _of_stack(self, module: PlannedModule, stack: StackedModule) -> list[ModuleSoup]:
        weights = [[plan.weights[index] for index in stack.experts] for plan in self.plans]
        if self.plan.method.family == "dense":
            return [self._of_dense(module, self.method.delta(module, stack, each)) for each in weights]
        if self.plan.encoding != "truncated":
            return [ModuleSoup(module, factors) for factors in self.method.factors(module, stack, weights)]
        if self.plan.method.family == "linear":
            decomposition = decompose(stack.factors, basis=stack.basis)
            return [_truncated(module, decomposition.truncate(each, **self._cut(module))) for each in weights]
        every = self.method.factors(module, stack, weights)
        return [_truncated(module, truncate(factors, **self._cut(module))) for factors in every]

    def _of_dense(self, module: PlannedModule, delta_OI: Tensor) -> ModuleSoup:
        if self.plan.encoding == "folded":
            return ModuleSoup(module, None, delta_OI)
        stream = Stream.of(0, module.name, "range finder")
        return _truncated(module, approximate(delta_OI, **self._cut(module), stream=stream))

    def _cut(self, module: PlannedModule) -> Mapping[str, Any]:
        return {"rank": module.rank} if self.plan.energy is None else {"energy": self.plan.energy}


def _blocks(stack: StackedModule, count: int) -> list[StackedModule]:
    """Return each block's own stack; experts that share A share every part of it."""
    parts = zip(*(blocks_of(factors, count) for factors in stack.factors), strict=True)
    return [replace(stack, name=f"{stack.name}[{number}]", factors=factors) for number, factors in enumerate(parts)]


def _joined(module: PlannedModule, blocks: Sequence[ModuleSoup]) -> ModuleSoup:
    """Return one module's soup from those of its blocks; of unequal ranks the lower ones are padded with zeros."""
    energy, lost = sum(block.energy for block in blocks), sum(block.lost for block in blocks)
    deltas = [block.delta_OI for block in blocks if block.delta_OI is not None]
    if deltas:
        return ModuleSoup(module, None, torch.stack(deltas), energy, lost)
    factors = [block.factors for block in blocks if block.factors is not None]
    rank = max(each.rank for each in factors)
    return ModuleSoup(module, of_blocks([each.padded(rank) for each in factors]), None, energy, lost)


def _truncated(module: PlannedModule, truncated: Truncated) -> ModuleSoup:
    return ModuleSoup(module, truncated.factors, None, truncated.energy, truncated.lost)
