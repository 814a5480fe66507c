"""`LiveAdapter` puts a soup (the weighted sum of the experts) into a loaded model, and changes the soup in place.

Shapes: K = rank of the live adapter.
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
from personalized_soups.devices import MERGE_DEVICES, resolve_device, torch_dtype
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
from personalized_soups.merging.planning.plan import MergePlan
from personalized_soups.merging.planning.planner import plan_merge
from personalized_soups.methods.factors import cancels
from personalized_soups.methods.method import Method
from personalized_soups.methods.plugins import DenseMerge, find_method, is_method_name
from personalized_soups.methods.table import METHODS


class LiveAdapter:
    """A soup of a library's experts on a device. `set(profile)` changes the soup in place.

    `set` reads the experts once and writes the soup once. It does not loop over modules, allocate memory or move the
    soup to another address, so CUDA graphs and compiled models use the new soup. The soup is zero until the first
    `set`.

    The rank of the soup depends on the method and on the experts. With `linear` and different A's, the soup contains
    the stacked factors of all experts, and `set` scales the columns of B. With `linear` and A's that are equal byte for
    byte, and with the factor methods, `set` sums the experts' B's (with factor methods also their A's), and the soup
    has the rank of one expert. The arithmetic is float32. A 16-bit soup is rounded once from float32.

    `set` is not atomic. A forward pass that runs at the same time on another thread or stream may use parts of the old
    and of the new soup. On CUDA, `set` is queued on the current stream like any kernel.

    Args:
        library: the experts.
        device: the device of the model: auto (CUDA if there is a GPU, else the CPU), cpu, cuda or cuda:N.
        method: linear, factor_average or factor_linear. Other methods cannot be used live; merge the experts instead.
        experts: the names of the experts that profiles can give a weight. The default is all experts of the library.
        dtype: the dtype of the soup's factors: float32 (the default), bfloat16 or float16.
        same_base: whether to accept experts that name different bases, or a base whose fingerprint differs from theirs.

    Raises:
        UnsupportedAdapterError: if an expert has anything but low-rank factors of linear layers.
        InputError: if an expert contains NaN or infinity.
        SoupError: if the experts cannot be merged, as in plan_merge.

    Example:
        >>> live = LiveAdapter(ExpertLibrary.open("experts"), device="cpu")
        >>> model = live.attach(Generator.open(TINY_BASE, device="cpu").model)
        >>> live.set(Profile(weights={"friendly": 0.6, "concise": 0.4}))
    """

    def __init__(
        self,
        library: ExpertLibrary,
        *,
        device: str = "auto",
        method: str | Method | DenseMerge = "linear",
        experts: Sequence[str] | None = None,
        dtype: str | None = None,
        same_base: bool = False,
    ) -> None:
        self.method = _checked_method(method)
        # the device of a tensor has an index, such as "cuda:0", like the devices of the model's tensors
        self.device = torch.empty(0, device=resolve_device(device, kinds=MERGE_DEVICES)).device
        self._library = library
        self._plan = _plan_of_all(library, self.method, experts, dtype or "float32", same_base=same_base)
        self._experts = {expert.name: library[expert.name] for expert in self._plan.experts}
        self._sides = SideRule.of(self._experts.values())
        # a buffer that is created in inference mode cannot be changed outside of inference mode
        with torch.inference_mode(False), torch.no_grad():
            self._buffers = _buffers(ExpertBank(list(self._experts.values())), self._plan, self.device)
            widths = [sum(product.widths) for product in self._buffers.products]
            self._coefficients = coefficients_on(self.device, widths)
        self._attached: list[tuple[weakref.ref[nn.Parameter], int]] = []
        self._profile: Profile | None = None

    @property
    def profile(self) -> Profile | None:
        """The profile of the last `set`. None while the soup is zero."""
        return self._profile

    @property
    def rank(self) -> int:
        """The rank K of every module of the live adapter."""
        return next(iter(self._buffers.factors.values())).rank

    @property
    def num_bytes(self) -> int:
        """The number of bytes on the device: the experts' fixed tensors and the factors of the soup."""
        return self._buffers.num_bytes

    def set(self, profile: Profile) -> None:
        """Change the soup in place to the soup of `profile`. Experts that the profile does not name have weight 0.

        If `set` raises an error, the soup does not change.

        Raises:
            DeclarationError: if the profile names unknown experts or two sides of one dimension.
            UsageError: if the profile asks for another method or a lower rank, if the method divides by the sum of the
                weights and the sum is about 0, if the dtype cannot hold the soup, or if a model was moved or cast after
                `attach`.
        """
        weights = self._checked_weights(profile)
        self._check_attached()
        coefficients = self._buffers.coefficients(weights)
        for product, numbers in zip(self._buffers.products, coefficients, strict=True):
            check_fits(product.bound(numbers), product.live.dtype)
        self._run(coefficients)
        self._profile = profile

    def zero(self) -> None:
        """Set the soup to zero in place. The model then computes the same as its base.

        Raises:
            UsageError: if a model was moved or cast after `attach`.
        """
        self._check_attached()
        self._run([[0.0] * len(self._experts)] * len(self._buffers.products))
        self._profile = None

    def attach(self, model: Any, *, adapter: str = "soup") -> Any:
        """Add this soup to `model` as an adapter, make the adapter active, and return the PeftModel.

        `model` itself is changed. The parameters of the adapter are frozen views of the soup's buffers with scaling 1,
        so `generate`, `state_dict` and `save_pretrained` use the soup of the last `set`. Several models may share one
        soup. If a model is moved or cast after `attach` (`to`, `half`), its parameters are copied, and the next `set`
        raises UsageError.

        Args:
            model: the base on the device of this soup, or a PeftModel of the base. The other adapters of a PeftModel
                become inactive.
            adapter: the name of the new adapter.

        Raises:
            IncompatibleExpertsError: if the model lacks modules that the experts adapt, or has them in other shapes.
            UsageError: if the model already has an adapter of this name, or is on another device.
        """
        from peft import LoraConfig, PeftModel, get_peft_model

        wrapped = isinstance(model, PeftModel)
        if wrapped and adapter in model.peft_config:
            raise UsageError(
                f"the model already has an adapter called {adapter!r}",
                where="adapter",
                mend="choose another name for the soup: live.attach(model, adapter='soup-2')",
            )
        check_model(model.get_base_model() if wrapped else model, self._plan, self.device)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=list(self._buffers.factors),
            task_type=self._plan.task_type,
            inference_mode=True,
        )
        # the factors that PEFT creates are replaced below, so PEFT creates them on the meta device, without memory
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
            # `to` moves all parameters of a model, so it is enough to check the last one
            probe = layer.lora_B[adapter].weight
        self._attached.append((weakref.ref(probe), probe.data_ptr()))
        return model

    def _run(self, coefficients: Sequence[Sequence[float]]) -> None:
        products = self._buffers.products
        numbers = (
            (number, width)
            for product, factors in zip(products, coefficients, strict=True)
            for number, width in zip(factors, product.widths, strict=True)
        )
        with self._coefficients.written(numbers) as parts:
            for product, part in zip(products, parts, strict=True):
                product.run(part)

    def _checked_weights(self, profile: Profile) -> list[float]:
        """Check the profile as plan_merge does, and return one weight per expert."""
        self._library.check(profile)
        absent = [name for name, weight in profile.weights.items() if weight != 0 and name not in self._experts]
        if absent:
            raise DeclarationError(
                f"the live soup was created without the expert {', '.join(map(repr, absent))}, but the profile "
                "gives it a weight",
                where=profile.place("weights", absent[0]),
                mend=f"create a LiveAdapter with this expert: experts=[..., {absent[0]!r}]",
            )
        self._sides.check(profile)
        # for a profile without a method, the method of the live soup is used; a merge uses the method of its options
        if "method" in profile.model_fields_set and profile.method != self.method.name:
            raise UsageError(
                f"the profile asks for the method {profile.method}, but the live soup uses {self.method.name}",
                where=profile.place("method"),
                mend=f"create another LiveAdapter(..., method={profile.method!r}), or merge the experts instead",
            )
        if profile.rank is not None and profile.rank < self.rank:
            raise UsageError(
                f"the profile asks for rank {profile.rank}; the live soup is exact and has rank {self.rank}",
                where=profile.place("rank"),
                mend="leave `rank` out of the profile, or merge the experts instead",
            )
        weights = profile.resolved_weights()
        if self.method.divides_by_sum and cancels(list(weights.values())):
            raise UsageError(
                f"the method {self.method.name} divides by the sum of the weights, which is {sum(weights.values()):g}",
                where=profile.place("weights"),
                mend="use the method `linear`, or change the weights so that their sum is not 0",
            )
        return [weights.get(name, 0.0) for name in self._experts]

    def _check_attached(self) -> None:
        probes = [(probe(), address) for probe, address in self._attached]
        if any(probe is not None and probe.data_ptr() != address for probe, address in probes):
            raise UsageError(
                "a model was moved or cast after the soup was attached, so `set` cannot change its adapter",
                where="LiveAdapter.attach",
                mend="call model.delete_adapter('soup'), move or cast the model, then attach the soup again",
            )


def _checked_method(method: str | Method | DenseMerge) -> Method:
    # if the method is from an installed package, its name is rejected without importing the package
    is_installed = isinstance(method, str) and is_method_name(method)
    name = method if isinstance(method, str) and is_installed else find_method(method).name
    if name != "linear" and name not in FACTOR_RULES:
        raise UsageError(
            f"a live soup cannot be computed by {name}; expected a method that sums the experts' factors",
            where="method",
            mend=f"merge the experts instead, or choose from: linear, {', '.join(FACTOR_RULES)}",
        )
    return METHODS[name]


def _plan_of_all(
    library: ExpertLibrary, method: Method, experts: Sequence[str] | None, dtype: str, *, same_base: bool
) -> MergePlan:
    """Return the plan of a merge in which every expert has weight 1.

    Planning the merge checks that the experts fit together.
    """
    names = list(library if experts is None else experts)
    if not names:
        raise UsageError(
            "a live soup needs at least one expert",
            where="experts",
            mend="give the name of at least one expert: experts=['friendly']",
        )
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
