"""Live weights: a soup inside a loaded model, changed in place by one product over one buffer.

E experts, K rank of the live adapter.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import DeclarationError, UsageError
from personalized_soups.merging.live.buffers import (
    FACTOR_RULES,
    LiveBuffers,
    check_fits,
    factor_buffers,
    free_buffers,
    shared_buffers,
)
from personalized_soups.merging.live.checks import check_model, check_plain
from personalized_soups.merging.live.coefficients import coefficients_on
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import MergePlan, plan_merge, resolve_device, torch_dtype
from personalized_soups.methods.factors import cancels
from personalized_soups.methods.method import Method
from personalized_soups.methods.table import method_named


class LiveAdapter:
    """The soup of a library's experts, held on a device such that `set(profile)` changes it in place.

    `set` reads the experts once and writes the soup once: no loop over modules, no allocation, no new addresses (CUDA
    graphs and compiled models see every change). Until the first `set` the soup is zero. `linear` of free experts
    holds the stack, of rank sum r, and scales B's columns; `linear` of experts that share their A byte for byte, and
    the factor methods, sum the experts' B's (and A's) at one expert's rank. Everything is computed in float32; 16-bit
    soups are rounded once from that.

    `set` is not atomic: a forward pass that runs on another thread or stream meanwhile sees a mixture of two soups.
    On CUDA it is queued on the current stream like any other kernel.

    Args:
        library: where the experts are.
        device: where the model is: auto (the CPU), cpu, cuda, cuda:N.
        method: linear, factor_average or factor_linear; the others are no product and have to be merged.
        experts: names of those that profiles may weigh; the whole library where left out.
        dtype: of the live factors: float32 (where left out), bfloat16 or float16.
        same_base: take it that all experts have one base.

    Raises:
        SoupError: everything that plan_merge raises of the experts; UnsupportedAdapterError where one holds more than
            low-rank factors of linear layers; InputError where one holds NaN or infinity.
    """

    def __init__(
        self,
        library: ExpertLibrary,
        *,
        device: str = "auto",
        method: str = "linear",
        experts: Sequence[str] | None = None,
        dtype: str | None = None,
        same_base: bool = False,
    ) -> None:
        self.method = _checked_method(method)
        # with its index, as a model's tensors tell it
        self.device = torch.empty(0, device=resolve_device(device)).device
        self._library = library
        self._plan = _plan_of_all(library, self.method, experts, dtype or "float32", same_base=same_base)
        self._experts = {each.name: library[each.name] for each in self._plan.experts}
        self._sides = SideRule.of(self._experts.values())
        # a buffer that was made in inference mode could not be changed outside of it
        with torch.inference_mode(False), torch.no_grad():
            self._buffers = _buffers(ExpertBank(list(self._experts.values())), self._plan, self.device)
            widths = [sum(product.widths) for product in self._buffers.products]
            self._coefficients = coefficients_on(self.device, widths)
        self._attached: list[tuple[weakref.ref[nn.Parameter], int]] = []
        self._profile: Profile | None = None

    @property
    def profile(self) -> Profile | None:
        """The profile whose soup this is; None while the soup is zero."""
        return self._profile

    @property
    def rank(self) -> int:
        """K, the rank of every module of the live adapter."""
        return next(iter(self._buffers.factors.values())).rank

    @property
    def num_bytes(self) -> int:
        """Bytes on the device: the experts as they are kept, and the live factors."""
        return self._buffers.num_bytes

    def set(self, profile: Profile) -> None:
        """Make the soup in place that of `profile`; experts that it does not name have weight 0.

        On a fault nothing is changed.

        Raises:
            DeclarationError: if the profile names unknown experts, or opposed sides.
            UsageError: if it asks for another method or a lower rank, its weights cancel where the method divides by
                their sum, the soup leaves the dtype, or a model was moved or cast since it was attached.
        """
        weights = self._checked_weights(profile)
        self._check_attached()
        coefficients = self._buffers.coefficients(weights)
        for product, numbers in zip(self._buffers.products, coefficients, strict=True):
            check_fits(product.bound(numbers), product.live.dtype)
        self._run(coefficients)
        self._profile = profile

    def zero(self) -> None:
        """Make the soup zero in place, which leaves the base alone."""
        self._check_attached()
        self._run([[0.0] * len(self._experts)] * len(self._buffers.products))
        self._profile = None

    def attach(self, model: Any, *, adapter: str = "soup") -> Any:
        """Return `model` as a PeftModel whose active adapter `adapter` is this soup; `model` itself is changed.

        The adapter's parameters are views into the live buffers: generate, state_dict and save_pretrained see every
        `set`. They are frozen, and their scaling is 1. Several models may have one soup. A model that is moved or cast
        afterwards (`to`, `half`) loses its soup, which the next `set` tells.

        Args:
            model: the base on this device, or a PeftModel of it, whose other adapters stay and become inactive.
            adapter: a name that the model does not have yet.

        Raises:
            IncompatibleExpertsError: if the model lacks modules that the experts adapt, or has them in other shapes.
            UsageError: if the name is taken or the model is on another device.
        """
        from peft import LoraConfig, PeftModel, get_peft_model

        wrapped = isinstance(model, PeftModel)
        if wrapped and adapter in model.peft_config:
            raise UsageError(
                f"the model has an adapter {adapter!r} already", where="adapter", mend="attach under another name"
            )
        check_model(model.get_base_model() if wrapped else model, self._plan, self.device)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=list(self._buffers.factors),
            task_type=self._plan.task_type,
            inference_mode=True,
        )
        # PEFT makes its own factors without memory, since none of them stays
        if wrapped:
            model.add_adapter(adapter, config, low_cpu_mem_usage=True)
            model.set_adapter(adapter)
        else:
            model = get_peft_model(model, config, adapter_name=adapter, low_cpu_mem_usage=True)
        base = model.get_base_model()
        for name, factors in self._buffers.factors.items():
            layer: Any = base.get_submodule(name)
            layer.lora_A[adapter].weight = nn.Parameter(factors.a_RI, requires_grad=False)
            layer.lora_B[adapter].weight = nn.Parameter(factors.b_OR, requires_grad=False)
            # modules hold their parameters by name: the last one stands for all, for they move together
            probe = layer.lora_B[adapter].weight
        self._attached.append((weakref.ref(probe), probe.data_ptr()))
        return model

    def _run(self, coefficients: Sequence[Sequence[float]]) -> None:
        products = self._buffers.products
        numbers = (
            (number, width)
            for product, each in zip(products, coefficients, strict=True)
            for number, width in zip(each, product.widths, strict=True)
        )
        with self._coefficients.written(numbers) as parts:
            for product, part in zip(products, parts, strict=True):
                product.run(part)

    def _checked_weights(self, profile: Profile) -> list[float]:
        """Return one weight per expert, in order, after the checks that plan_merge makes of a profile."""
        self._library.check(profile)
        absent = [name for name, weight in profile.weights.items() if weight != 0 and name not in self._experts]
        if absent:
            raise DeclarationError(
                f"the live soup holds no expert called {', '.join(map(repr, absent))}",
                where=profile.place("weights", absent[0]),
                mend=f"make the LiveAdapter with it too: experts=[..., {absent[0]!r}]",
            )
        self._sides.check(profile)
        # a profile that names no method takes the one that it is given, as in a merge
        if "method" in profile.model_fields_set and profile.method != self.method.name:
            raise UsageError(
                f"the profile asks for {profile.method}, the live soup is made by {self.method.name}",
                where=profile.place("method"),
                mend=f"make another LiveAdapter(..., method={profile.method!r}), or merge",
            )
        if profile.rank is not None and profile.rank < self.rank:
            raise UsageError(
                f"the profile asks for rank {profile.rank}, a live soup is exact and has rank {self.rank}",
                where=profile.place("rank"),
                mend="leave `rank` out, or merge",
            )
        weights = profile.resolved_weights()
        if self.method.divides_by_sum and cancels(list(weights.values())):
            raise UsageError(
                f"{self.method.name} divides by the sum of the weights, which is {sum(weights.values()):g}",
                where=profile.place("weights"),
                mend="take the method `linear`, or weights that do not cancel",
            )
        return [weights.get(name, 0.0) for name in self._experts]

    def _check_attached(self) -> None:
        probes = [(probe(), address) for probe, address in self._attached]
        if any(probe is not None and probe.data_ptr() != address for probe, address in probes):
            raise UsageError(
                "a model was moved or cast since its soup was attached: its adapter is a copy that stays as it is",
                where="LiveAdapter.attach",
                mend="move and cast the model first, then attach; delete_adapter frees it of the copy",
            )


def _checked_method(name: str) -> Method:
    method = method_named(name)
    if method.name != "linear" and method.name not in FACTOR_RULES:
        raise UsageError(
            f"a live soup cannot be made by {method.name}, which is no product of experts and weights",
            where="method",
            mend=f"merge instead, or take one of: linear, {', '.join(FACTOR_RULES)}",
        )
    return method


def _plan_of_all(
    library: ExpertLibrary, method: Method, experts: Sequence[str] | None, dtype: str, *, same_base: bool
) -> MergePlan:
    """Return the plan in which every expert has weight 1: it checks of the experts whatever a merge would check."""
    names = list(library if experts is None else experts)
    if not names:
        raise UsageError("a live soup of no experts", where="experts", mend="name one expert or more")
    everyone = Profile(weights=dict.fromkeys(names, 1.0), allow_opposed=True)
    check_plain([library[name] for name in names if name in library])
    return plan_merge(library, everyone, MergeOptions(method=method, dtype=dtype, same_base=same_base))


def _buffers(bank: ExpertBank, plan: MergePlan, device: torch.device) -> LiveBuffers:
    dtype = torch_dtype(plan.dtype)
    if plan.method.family == "factor":
        return factor_buffers(bank, plan.modules, plan.rank, FACTOR_RULES[plan.method.name], dtype, device=device)
    if plan.shares_basis:
        return shared_buffers(bank, plan.modules, plan.rank, dtype, device=device)
    return free_buffers(bank, plan.modules, dtype, device=device)
