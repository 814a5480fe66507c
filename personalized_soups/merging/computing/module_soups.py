"""Compute the soups of one or many users, module by module. Only a few modules are in memory at once.

Shapes: R = rank, I = in_features, O = out_features.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.placement import blocks_of, of_blocks
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.bank.expert_bank import ExpertBank, StackedModule
from personalized_soups.launching.threads import in_order, num_workers
from personalized_soups.merging.computing.applied_method import AppliedMethod
from personalized_soups.merging.computing.dora import Dora, base_scale, turned
from personalized_soups.merging.planning.plan import MergePlan, PlannedModule
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.linear import linear
from personalized_soups.methods.lowrank import Truncated, decompose, truncate
from personalized_soups.methods.rangefinder import approximate
from personalized_soups.methods.streams import Stream

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False, slots=True)
class ModuleSoup:
    """The soup of one module. It has either factors or a dense delta.

    Attributes:
        module: the planned module.
        factors: the factors, with scaling 1, or None. The blocks of a mixture-of-experts parameter are interleaved, as
            PEFT stores them.
        delta_OI: the dense delta, or None. For a mixture-of-experts parameter, the blocks are an additional first axis.
        energy: the squared Frobenius norm of the delta; 0 if nothing is truncated.
        lost: the squared Frobenius norm of the truncated part; 0 if nothing is truncated.
        scale_O: the factor by which the soup multiplies the base's outputs, in float64 on the CPU; None if no expert
            has DoRA magnitudes for the module.
        bias_O: the bias of the merged B (lora_bias), `sum w_e s_e b_e` in float64; None if no expert has such a bias.
        dora: computes the norms for the magnitude of a merged adapter; None if no expert has DoRA magnitudes.
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
    """The soups of one or many users with the same experts. The bank's device computes them.

    Attributes:
        plans: the plan of each user. The plans differ only in their profiles and weights, so each module of the experts
            is read once for all users.
        bank: the experts.
        dora: the experts' DoRA magnitudes and the base; None if no expert has magnitudes.
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
        """Compute each module's soups, and yield `finish(soups)` in the plan's order of modules.

        On a CPU, several threads compute modules at once, and `finish` runs on the thread that computed the module.
        """
        self.prepare()
        return in_order(lambda module: finish(self.of(module)), self.plan.modules, num_workers(self.bank.device))

    def prepare(self) -> None:
        """Compute the values that all modules need. Otherwise several threads might compute them at once."""
        self.method.prepare()
        _ = self.on

    @cached_property
    def on(self) -> LoraAdapter | None:
        """The base adapter that the soups include; None if they include none."""
        return None if self.plan.on_folder is None else LoraAdapter.open(self.plan.on_folder)

    @property
    def sources(self) -> tuple[Expert, ...]:
        """The experts and, if the soups include a base adapter, this adapter."""
        folder = self.plan.on_folder
        return self.bank.experts if folder is None else (*self.bank.experts, Expert(Path(folder).name, Path(folder)))

    @cached_property
    def method(self) -> AppliedMethod:
        """The merge method of the plans, with the experts of the bank."""
        return AppliedMethod(self.plans, self.bank)

    def of(self, module: PlannedModule) -> list[ModuleSoup]:
        """Return the soup of one module for each plan. The tensors are float32, but truncated factors are float64.

        Raises:
            InputError: if an expert holds NaN or infinity. The message names the file and the tensor.
            InputError, UnsupportedAdapterError: as in `Dora.gains`.
        """
        if not module.experts:
            soups = [ModuleSoup(module, None) for _ in self.plans]
        else:
            stack = self.bank.read(module.name)
            with self._one_at_a_time():
                soups = self._of_read(module, stack)
        return soups if module.on_rank == 0 else self._with_adapter(module, soups)

    def _with_adapter(self, module: PlannedModule, soups: Sequence[ModuleSoup]) -> list[ModuleSoup]:
        """Return the soups plus the base adapter's delta of the module, with weight 1.

        The adapter's factors are stacked behind those of a soup. A truncated soup is not truncated again.
        """
        assert self.on is not None
        read = self.on.factors(module.name)
        factors = Factors(read.a_RI.to(self.bank.device), read.b_OR.to(self.bank.device), read.scaling)
        return [with_factors(soup, factors) for soup in soups]

    def _one_at_a_time(self) -> AbstractContextManager[object]:
        """Return a lock if the device is a GPU, else a context manager that does nothing.

        On a GPU, computing several modules at once would need more memory and save no time.
        """
        return nullcontext() if self.bank.device.type == "cpu" else self._turn

    def _of_read(self, module: PlannedModule, stack: StackedModule) -> list[ModuleSoup]:
        """Return the soup of one module for each plan, given the experts' factors."""
        if module.like.blocks > 1:
            # each block of a mixture-of-experts parameter is a separate matrix with its own delta
            blocks = [self._of_stack(module, each) for each in _blocks(stack, module.like.blocks)]
            return [_joined(module, soups) for soups in zip(*blocks, strict=True)]
        # the gains are computed from the experts' own factors, so before any B is scaled
        gains = {} if self.dora is None else self.dora.gains(stack)
        soups = self._of_stack(module, turned(stack, gains) if gains else stack)
        if self.plan.layout.is_plain:
            return soups
        return [self._completed(soup, plan, gains) for soup, plan in zip(soups, self.plans, strict=True)]

    def _completed(self, soup: ModuleSoup, plan: MergePlan, gains: Mapping[int, Tensor]) -> ModuleSoup:
        """Return the module's soup with DoRA's scale and the bias of B (lora_bias) filled in."""
        weights = dict(enumerate(plan.weights))
        scale_O = base_scale(gains, weights) if gains else None
        bias_O = None
        if plan.layout.lora_bias:
            # lora_bias applies to all modules of an adapter, so every module gets a bias, which may be zero
            bias_O = torch.zeros(soup.module.out_features, dtype=torch.float64)
            for expert, bias in self._biases.get(soup.module.name, ()):
                value_O = self.bank.experts[expert].adapter.trained_tensor(bias.name, torch.float64)
                # PEFT adds the bias to the output of B, so the scaling multiplies the bias as well
                bias_O.add_(value_O, alpha=weights[expert] * bias.scaling)
        return replace(soup, scale_O=scale_O, bias_O=bias_O, dora=self.dora)

    @cached_property
    def _biases(self) -> Mapping[str, list[tuple[int, TrainedTensor]]]:
        """The biases of the experts' B's (lora_bias), each with the expert's position in the bank, by module name."""
        biases: dict[str, list[tuple[int, TrainedTensor]]] = {}
        for index, expert in enumerate(self.bank.experts):
            for tensor in expert.adapter.trained.values():
                if tensor.kind == "added" and tensor.module is not None:
                    biases.setdefault(tensor.module, []).append((index, tensor))
        return biases

    def _of_stack(self, module: PlannedModule, stack: StackedModule) -> list[ModuleSoup]:
        """Return the soup of one module, or of one block of a module, for each plan."""
        # the stack has only the experts that adapt this module, so their weights are selected
        weights = [[plan.weights[index] for index in stack.experts] for plan in self.plans]
        if self.plan.method.family == "dense":
            return [self._of_dense(module, self.method.delta(module, stack, each)) for each in weights]
        if self.plan.encoding != "truncated":
            return [ModuleSoup(module, factors) for factors in self.method.factors(module, stack, weights)]
        if self.plan.method.family == "linear":
            # the decomposition does not depend on the weights, so it is computed once for all users
            decomposition = decompose(stack.factors, basis=stack.basis)
            return [_truncated(module, decomposition.truncate(each, **self._cut(module))) for each in weights]
        every = self.method.factors(module, stack, weights)
        return [_truncated(module, truncate(factors, **self._cut(module))) for factors in every]

    def _of_dense(self, module: PlannedModule, delta_OI: Tensor) -> ModuleSoup:
        """Return the soup with a dense delta. An adapter needs factors, so the delta is then truncated."""
        if self.plan.encoding == "folded":
            return ModuleSoup(module, None, delta_OI)
        # the range finder is random, and the fixed seed 0 makes its result reproducible
        stream = Stream.of(0, module.name, "range finder")
        return _truncated(module, approximate(delta_OI, **self._cut(module), stream=stream))

    def _cut(self, module: PlannedModule) -> Mapping[str, Any]:
        return {"rank": module.rank} if self.plan.energy is None else {"energy": self.plan.energy}


def with_factors(soup: ModuleSoup, factors: Factors) -> ModuleSoup:
    """Return a soup plus `scaling * B A` of these factors. Energy and loss stay those of the soup alone.

    The blocks of a mixture-of-experts parameter are interleaved in `factors`, as PEFT stores them.
    """
    count = soup.module.like.blocks
    added = blocks_of(factors, count)
    if soup.delta_OI is not None:
        deltas = [block.delta() for block in added]
        return replace(soup, delta_OI=soup.delta_OI + (deltas[0] if count == 1 else torch.stack(deltas)))
    own: Sequence[Sequence[Factors]] = [()] * count
    if soup.factors is not None:
        own = [[block] for block in blocks_of(soup.factors, count)]
    # `linear` stacks the factors and multiplies the scaling into B: in float64, rounded once
    stacked = [linear([*old, new], [1.0] * (len(old) + 1)) for old, new in zip(own, added, strict=True)]
    return replace(soup, factors=of_blocks(stacked))


def _blocks(stack: StackedModule, count: int) -> list[StackedModule]:
    """Return one stack for each block of a module."""
    # experts with equal A's have equal A's in every block, so `basis` does not change
    parts = zip(*(blocks_of(factors, count) for factors in stack.factors), strict=True)
    # the name selects the random numbers, so with the block's number a method drops other entries in each block
    return [replace(stack, name=f"{stack.name}[{number}]", factors=factors) for number, factors in enumerate(parts)]


def _joined(module: PlannedModule, blocks: Sequence[ModuleSoup]) -> ModuleSoup:
    """Return the soup of a module, given the soups of the module's blocks."""
    # the blocks are separate matrices, so the squared Frobenius norm of the module is the sum of theirs
    energy, lost = sum(block.energy for block in blocks), sum(block.lost for block in blocks)
    deltas = [block.delta_OI for block in blocks if block.delta_OI is not None]
    if deltas:
        return ModuleSoup(module, None, torch.stack(deltas), energy, lost)
    # with an energy share the blocks can have different ranks, but PEFT stores one rank for all blocks
    factors = [block.factors for block in blocks if block.factors is not None]
    rank = max(each.rank for each in factors)
    return ModuleSoup(module, of_blocks([each.padded(rank) for each in factors]), None, energy, lost)


def _truncated(module: PlannedModule, truncated: Truncated) -> ModuleSoup:
    return ModuleSoup(module, truncated.factors, None, truncated.energy, truncated.lost)
