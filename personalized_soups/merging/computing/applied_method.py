"""Apply the merge method of the plans to one module of the experts, for one or many users.

Shapes: R = rank, I = in_features, O = out_features, E = number of experts, U = number of users.
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
    """The merge method of the users' plans, with the experts that the method merges.

    Attributes:
        plans: the plan of each user. The plans differ only in their profiles and weights.
        bank: the experts.
    """

    plans: Sequence[MergePlan]
    bank: ExpertBank

    @property
    def plan(self) -> MergePlan:
        """The first plan, for the choices that all plans share."""
        return self.plans[0]

    def prepare(self) -> None:
        """Compute the thresholds if the method needs them. Otherwise several threads might compute them at once."""
        if self.plan.method.trims_globally:
            # TF32 products on a GPU have 10 bits, so entries would change sides of the threshold
            with full_precision():
                _ = self.thresholds

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """The threshold of each expert. A method that trims over the whole model drops entries of smaller magnitude."""
        # the authors of TIES trim over the whole model, not tensor by tensor (arXiv 2306.01708)
        density = self.plan.options["density"]
        return tuple(
            global_threshold(lambda expert=index: self._deltas_of(expert), density)  # type: ignore[misc]
            for index in range(len(self.bank.experts))
        )

    def factors(self, module: PlannedModule, stack: StackedModule, weights: Sequence[Sequence[float]]) -> list[Factors]:
        """Return the factors of one module's soup for each user. Only for methods that merge factors.

        Args:
            module: the planned module.
            stack: the factors of the experts that adapt the module.
            weights: for each plan, the weights of the stack's experts.

        Returns:
            The factors in the order of the plans. Their scaling is 1.
        """
        method = self.plan.method
        # for one user or for one expert, scaled copies of the factors are faster than a matrix product
        if len(self.plans) > 1 and len(stack.experts) > 1:
            if method.family == "linear" and not any(stack.basis):
                return _on_one_basis(stack, weights)
            if method.coefficients:
                return self._in_products(stack, weights)
        keywords = self._keywords(stack)
        if method.family == "linear":
            # experts that share an A are summed, so the soup's rank does not grow with their number
            keywords["basis"] = stack.basis
        function = method.load()
        if self.plan.method_source is not None:
            function = partial(merged_factors, method, stack.name, rank=module.full_rank)
        if not method.divides_by_sum:
            return [function(stack.factors, user_weights, **keywords) for user_weights in weights]
        # an expert that does not adapt this module contributes zero, but the expert's weight stays in the divisor
        totals = [math.fsum(plan.weights) for plan in self.plans]
        return [
            function(stack.factors, user_weights, total=total, **keywords)
            for user_weights, total in zip(weights, totals, strict=True)
        ]

    def delta(self, module: PlannedModule, stack: StackedModule, weights: Sequence[float]) -> Tensor:
        """Return the dense delta_OI of one module's soup for one user. Only for methods that merge dense deltas."""
        keywords = self._keywords(stack)
        # the stack has only the experts that adapt this module, but the thresholds are those of the whole bank
        if self.plan.method.trims_globally:
            keywords["thresholds"] = [self.thresholds[index] for index in stack.experts]
        # memory: O x I values for each expert, much more than the factors
        deltas = [each.delta() for each in stack.factors]
        if self.plan.method_source is not None:
            return merged_delta(self.plan.method, stack.name, deltas, weights, **keywords)
        delta_OI: Tensor = self.plan.method.load()(deltas, weights, **keywords)
        return delta_OI

    def _in_products(self, stack: StackedModule, weights: Sequence[Sequence[float]]) -> list[Factors]:
        """Return the factors of each user. One matrix product computes the A's of all users, another all B's."""
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
        """Return the keyword arguments for the method's function that come from the method's options."""
        options = self.plan.options
        keywords: dict[str, Any] = {OPTIONS[name].keyword: value for name, value in options.items() if name != "seed"}
        if "seed" in options:
            names = [self.bank.experts[index].name for index in stack.experts]
            # one random stream for each module and expert, so the result does not depend on the order of computation
            keywords["streams"] = [Stream.of(int(options["seed"]), stack.name, name) for name in names]
        return keywords

    def _deltas_of(self, expert: int) -> Iterator[Tensor]:
        """Yield the dense deltas of all modules of one expert."""
        # a generator, so that only one dense delta is in memory at once
        for name in self.bank.modules:
            if expert in self.bank.members(name):
                # the factors of a mixture's blocks are interleaved, so one product over all blocks is not the delta
                blocks = self.bank.experts[expert].adapter.modules[name].blocks
                for block in blocks_of(self.bank.factors(expert, name), blocks):
                    yield block.delta()


def _on_one_basis(stack: StackedModule, weights: Sequence[Sequence[float]]) -> list[Factors]:
    """Return the factors of each user if all experts share their A. One product computes the B's of all users."""
    # with s_e w_e as the coefficients of the B's, the scaling of the result is 1 and A needs no change
    scalings_E = torch.tensor(stack.scalings, dtype=torch.float64)
    weights_UE = torch.tensor(weights, dtype=torch.float64) * scalings_E
    b_UOR = _summed(weights_UE, [each.b_OR for each in stack.factors])
    return [Factors(stack.factors[0].a_RI, b_OR) for b_OR in b_UOR]


def _summed(weights_UE: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    return weighted_sums(weights_UE, tensors).view(len(weights_UE), *tensors[0].shape)
