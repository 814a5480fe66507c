"""Soups, module by module: what the plan's method makes of the experts' factors. Memory: the modules in work.

R rank, I in features, O out features, E experts, U users.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from personalized_soups.adapters.placement import blocks_of, of_blocks
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.bank.expert_bank import ExpertBank, StackedModule
from personalized_soups.launching.threads import full_precision, in_order, num_workers
from personalized_soups.merging.computing.custom_method import merged_delta, merged_factors
from personalized_soups.merging.computing.dora import Dora, base_scale, turned
from personalized_soups.merging.planning.plan import MergePlan, PlannedModule
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.lowrank import Truncated, decompose, truncate
from personalized_soups.methods.options import OPTIONS
from personalized_soups.methods.product import weighted_sums
from personalized_soups.methods.rangefinder import approximate
from personalized_soups.methods.sparsify import global_threshold
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
        if self.plan.method.trims_globally:
            with full_precision():
                _ = self.thresholds

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
            return [self._of_dense(module, self._dense(module, stack, each)) for each in weights]
        if self.plan.encoding != "truncated":
            return [ModuleSoup(module, factors) for factors in self._factors(module, stack, weights)]
        if self.plan.method.family == "linear":
            decomposition = decompose(stack.factors, basis=stack.basis)
            return [_truncated(module, decomposition.truncate(each, **self._cut(module))) for each in weights]
        every = self._factors(module, stack, weights)
        return [_truncated(module, truncate(factors, **self._cut(module))) for factors in every]

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """Each expert's magnitude below which a method that trims over the whole model trims."""
        density = self.plan.options["density"]
        return tuple(
            global_threshold(lambda expert=index: self._deltas_of(expert), density)  # type: ignore[misc]
            for index in range(len(self.bank.experts))
        )

    def _factors(
        self, module: PlannedModule, stack: StackedModule, weights: Sequence[Sequence[float]]
    ) -> list[Factors]:
        method = self.plan.method
        if len(self.plans) > 1 and len(stack.experts) > 1:  # one expert's own is scaled, which needs no product
            if method.family == "linear" and not any(stack.basis):
                return _on_one_basis(stack, weights)
            if method.coefficients:
                return self._in_products(stack, weights)
        keywords = self._keywords(module, stack)
        if method.family == "linear":
            keywords["basis"] = stack.basis
        function = method.load()
        if self.plan.method_source is not None:
            function = partial(merged_factors, method, stack.name, rank=module.full_rank)
        if not method.divides_by_sum:
            return [function(stack.factors, each, **keywords) for each in weights]
        # a module that an expert lacks contributes zero: the sum of the weights stays that of all experts
        totals = [math.fsum(plan.weights) for plan in self.plans]
        return [
            function(stack.factors, each, total=total, **keywords) for each, total in zip(weights, totals, strict=True)
        ]

    def _in_products(self, stack: StackedModule, weights: Sequence[Sequence[float]]) -> list[Factors]:
        """Return every user's A and B, each of them out of one product."""
        method = self.plan.method
        totals = [{"total": math.fsum(plan.weights)} if method.divides_by_sum else {} for plan in self.plans]
        coefficients = method.load_coefficients()
        pairs = [coefficients(stack.scalings, each, **total) for each, total in zip(weights, totals, strict=True)]
        a_UE, b_UE = (torch.tensor(each, dtype=torch.float64) for each in zip(*pairs, strict=True))
        a_URI = _summed(a_UE, [each.a_RI for each in stack.factors])
        b_UOR = _summed(b_UE, [each.b_OR for each in stack.factors])
        return [Factors(a_RI, b_OR) for a_RI, b_OR in zip(a_URI, b_UOR, strict=True)]

    def _dense(self, module: PlannedModule, stack: StackedModule, weights: Sequence[float]) -> Tensor:
        keywords = self._keywords(module, stack)
        if self.plan.method.trims_globally:
            keywords["thresholds"] = [self.thresholds[index] for index in stack.experts]
        deltas = [each.delta() for each in stack.factors]
        if self.plan.method_source is not None:
            return merged_delta(self.plan.method, stack.name, deltas, weights, **keywords)
        delta_OI: Tensor = self.plan.method.load()(deltas, weights, **keywords)
        return delta_OI

    def _of_dense(self, module: PlannedModule, delta_OI: Tensor) -> ModuleSoup:
        if self.plan.encoding == "folded":
            return ModuleSoup(module, None, delta_OI)
        stream = Stream.of(0, module.name, "range finder")
        return _truncated(module, approximate(delta_OI, **self._cut(module), stream=stream))

    def _keywords(self, module: PlannedModule, stack: StackedModule) -> dict[str, Any]:
        options = self.plan.options
        keywords: dict[str, Any] = {OPTIONS[name].keyword: value for name, value in options.items() if name != "seed"}
        if "seed" in options:
            names = [self.bank.experts[index].name for index in stack.experts]
            keywords["streams"] = [Stream.of(int(options["seed"]), stack.name, name) for name in names]
        return keywords

    def _cut(self, module: PlannedModule) -> Mapping[str, Any]:
        return {"rank": module.rank} if self.plan.energy is None else {"energy": self.plan.energy}

    def _deltas_of(self, expert: int) -> Iterator[Tensor]:
        for name in self.bank.modules:
            if expert in self.bank.members(name):
                blocks = self.bank.experts[expert].adapter.modules[name].blocks
                for block in blocks_of(self.bank.factors(expert, name), blocks):
                    yield block.delta()


def _on_one_basis(stack: StackedModule, weights: Sequence[Sequence[float]]) -> list[Factors]:
    """Return every user's sum of experts that share their A: A as it is, and all B's in one product."""
    scalings = torch.tensor(stack.scalings, dtype=torch.float64)
    weights_UE = torch.tensor(weights, dtype=torch.float64) * scalings
    b_UOR = _summed(weights_UE, [each.b_OR for each in stack.factors])
    return [Factors(stack.factors[0].a_RI, b_OR) for b_OR in b_UOR]


def _summed(weights_UE: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return weighted_sums(weights_UE, tensors).view(len(weights_UE), *tensors[0].shape)


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
