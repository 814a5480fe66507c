"""Apply the plan's merge method to the factors of one module, for one or many users.

R rank, I in features, O out features, E experts, U users.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from personalized_soups.adapters.placement import blocks_of
from personalized_soups.bank.expert_bank import ExpertBank, StackedModule
from personalized_soups.launching.threads import full_precision
from personalized_soups.merging.computing.custom_method import merged_delta, merged_factors
from personalized_soups.merging.planning.plan import MergePlan, PlannedModule
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.options import OPTIONS
from personalized_soups.methods.product import weighted_sums
from personalized_soups.methods.sparsify import global_threshold
from personalized_soups.methods.streams import Stream


@dataclass(frozen=True, eq=False)
class AppliedMethod:
    """The merge method of plans over the same experts.

    Attributes:
        plans: the users' plans; they differ only in their profiles and weights.
        bank: the experts.
    """

    plans: Sequence[MergePlan]
    bank: ExpertBank

    @property
    def plan(self) -> MergePlan:
        """The choices that all plans share."""
        return self.plans[0]

    def prepare(self) -> None:
        """Compute what all modules need, so that threads do not compute it twice."""
        if self.plan.method.trims_globally:
            # TF32 products on a GPU would move entries across the threshold
            with full_precision():
                _ = self.thresholds

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """For each expert, the magnitude below which a method that trims over the whole model drops entries."""
        # the authors of TIES trim over the whole model, not tensor by tensor (arXiv 2306.01708)
        density = self.plan.options["density"]
        return tuple(
            global_threshold(lambda expert=index: self._deltas_of(expert), density)  # type: ignore[misc]
            for index in range(len(self.bank.experts))
        )

    def factors(self, module: PlannedModule, stack: StackedModule, weights: Sequence[Sequence[float]]) -> list[Factors]:
        """Return every user's factors of one module, by a method that merges factors; scaling 1.

        Args:
            module: the planned module.
            stack: the experts' factors.
            weights: for each plan, the weights of the stack's experts.
        """
        method = self.plan.method
        # for one user, or one expert, scaling the factors is faster than a product
        if len(self.plans) > 1 and len(stack.experts) > 1:
            if method.family == "linear" and not any(stack.basis):
                return _on_one_basis(stack, weights)
            if method.coefficients:
                return self._in_products(stack, weights)
        keywords = self._keywords(stack)
        if method.family == "linear":
            # experts with one A are summed at their own rank, not stacked
            keywords["basis"] = stack.basis
        function = method.load()
        if self.plan.method_source is not None:
            function = partial(merged_factors, method, stack.name, rank=module.full_rank)
        if not method.divides_by_sum:
            return [function(stack.factors, user_weights, **keywords) for user_weights in weights]
        # an expert that lacks this module contributes zero to it, but its weight stays in the divisor
        totals = [math.fsum(plan.weights) for plan in self.plans]
        return [
            function(stack.factors, user_weights, total=total, **keywords)
            for user_weights, total in zip(weights, totals, strict=True)
        ]

    def delta(self, module: PlannedModule, stack: StackedModule, weights: Sequence[float]) -> Tensor:
        """Return one user's delta_OI of one module, by a method that merges dense deltas."""
        keywords = self._keywords(stack)
        # the stack may lack experts, so thresholds are picked by position in the bank
        if self.plan.method.trims_globally:
            keywords["thresholds"] = [self.thresholds[index] for index in stack.experts]
        # O x I values for each expert: dense methods need the most memory
        deltas = [each.delta() for each in stack.factors]
        if self.plan.method_source is not None:
            return merged_delta(self.plan.method, stack.name, deltas, weights, **keywords)
        delta_OI: Tensor = self.plan.method.load()(deltas, weights, **keywords)
        return delta_OI

    def _in_products(self, stack: StackedModule, weights: Sequence[Sequence[float]]) -> list[Factors]:
        """Return every user's A and B from two products: one for all A's, one for all B's."""
        method = self.plan.method
        totals = [{"total": math.fsum(plan.weights)} if method.divides_by_sum else {} for plan in self.plans]
        coefficients = method.load_coefficients()
        pairs = [coefficients(stack.scalings, own, **total) for own, total in zip(weights, totals, strict=True)]
        # float64 coefficients: roots and quotients are rounded once, when the product converts them to float32
        a_UE, b_UE = (torch.tensor(each, dtype=torch.float64) for each in zip(*pairs, strict=True))
        a_URI = _summed(a_UE, [each.a_RI for each in stack.factors])
        b_UOR = _summed(b_UE, [each.b_OR for each in stack.factors])
        return [Factors(a_RI, b_OR) for a_RI, b_OR in zip(a_URI, b_UOR, strict=True)]

    def _keywords(self, stack: StackedModule) -> dict[str, Any]:
        options = self.plan.options
        keywords: dict[str, Any] = {OPTIONS[name].keyword: value for name, value in options.items() if name != "seed"}
        if "seed" in options:
            names = [self.bank.experts[index].name for index in stack.experts]
            # a stream for each module and expert, so that the result does not depend on the order of computation
            keywords["streams"] = [Stream.of(int(options["seed"]), stack.name, name) for name in names]
        return keywords

    def _deltas_of(self, expert: int) -> Iterator[Tensor]:
        for name in self.bank.modules:
            if expert in self.bank.members(name):
                # interleaved factors of a mixture are no single product
                blocks = self.bank.experts[expert].adapter.modules[name].blocks
                for block in blocks_of(self.bank.factors(expert, name), blocks):
                    yield block.delta()


def _on_one_basis(stack: StackedModule, weights: Sequence[Sequence[float]]) -> list[Factors]:
    """Return every user's sum of experts that share their A: A unchanged, and all B's from one product."""
    scalings_E = torch.tensor(stack.scalings, dtype=torch.float64)
    weights_UE = torch.tensor(weights, dtype=torch.float64) * scalings_E
    b_UOR = _summed(weights_UE, [each.b_OR for each in stack.factors])
    return [Factors(stack.factors[0].a_RI, b_OR) for b_OR in b_UOR]


def _summed(weights_UE: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return weighted_sums(weights_UE, tensors).view(len(weights_UE), *tensors[0].shape)
