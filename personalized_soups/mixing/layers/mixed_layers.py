"""The layers of a model that experts adapt. MixedLayers wraps them and gives them new stacks when experts change.

A layer's stack holds the LoRA factors of all experts that adapt the layer. A layer's slot is its number among the
wrapped layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from personalized_soups.adapters.library import Expert
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.launching.threads import in_order, num_workers
from personalized_soups.mixing.layers.cache_keys import CacheKeys
from personalized_soups.mixing.layers.experts import Members, bare_layer, check_experts
from personalized_soups.mixing.layers.forward_watch import ForwardWatch
from personalized_soups.mixing.layers.gates import Gates
from personalized_soups.mixing.layers.grouping import LayerGroups
from personalized_soups.mixing.layers.mixed_linear import MixedLinear
from personalized_soups.mixing.layers.stack import Member, Stack


class MixedLayers:
    """All wrapped layers of a model, the experts whose factors they hold, and their gates.

    Attributes:
        gates: the gates that all layers share.
        groups: the groups of layers that share a matrix product.
        cache_keys: makes the keys under which the keys and values of prompts may be cached.
        watch: the hook that runs before each forward pass of the model.

    Args:
        model: a model of transformers. Layers that experts adapt are replaced by wrapped layers.
    """

    def __init__(self, model: Any) -> None:
        self.gates = Gates()
        self.groups = LayerGroups(model, self.gates)
        self.cache_keys = CacheKeys()
        self.watch = ForwardWatch(model, self.gates, self._gates_fit)
        self._model = model
        self._layers: dict[str, MixedLinear] = {}
        self._experts: dict[str, Expert] = {}

    @property
    def experts(self) -> Mapping[str, Expert]:
        """The experts by name, sorted."""
        return MappingProxyType(self._experts)

    @property
    def by_name(self) -> Mapping[str, MixedLinear]:
        """The wrapped layers by their names in the base, in the order of their slots."""
        return MappingProxyType(self._layers)

    @property
    def num_bytes(self) -> int:
        """The size in bytes of all stacks, and of the memory that groups reserve for more experts."""
        return sum(layer.stack.num_bytes for layer in self._layers.values()) + self.groups.num_spare_bytes

    def cache_key(self, weights: ExpertWeights) -> str:
        """Return the key under which the keys and values that are computed with these weights may be cached."""
        return self.cache_keys.of(weights, self._model.dtype)

    def change(self, added: Sequence[Expert], removed: Iterable[str] = (), *, same_base: bool = False) -> None:
        """Add and remove experts. An added expert replaces an expert that has the same name.

        Only layers that an added or removed expert adapts get new stacks. The files of the other experts are not read
        again. After an error, the experts are the same as before.

        Raises:
            SoupError: in the same cases as check_experts and Members.of.
        """
        # An expert that is added again is read again, because its files may have changed.
        gone = {*removed, *(expert.name for expert in added)}
        kept = {name: expert for name, expert in self._experts.items() if name not in gone}
        # The kept experts are checked, too, because all experts must fit together.
        check_experts([*kept.values(), *added], self._model, self.gates, same_base=same_base)
        fresh = Members(added, self._model, self.gates, self._model.dtype)
        # Sorted, so that the order in which experts are added does not change the stacks.
        names = sorted({*self._layers, *fresh.modules})

        def stack_of(name: str) -> Stack | None:
            return self._stack_of(name, fresh.of(name) if name in fresh.modules else [], gone)

        # With threads, one file is read while another stack is cast. All stacks are made before any layer changes.
        stacks = list(in_order(stack_of, names, num_workers(torch.device("cpu"))))
        # From here on, only a warning that the user has turned into an error can raise.
        self.groups.dissolve_of(
            {self._layers[name] for name, stack in zip(names, stacks, strict=True) if stack is None}
        )
        for name, stack in zip(names, stacks, strict=True):
            self._put(name, stack)
        self._experts = dict(sorted({**kept, **{expert.name: expert for expert in added}}.items()))
        self.cache_keys.keep(self._experts)
        self.cache_keys.renew(expert.name for expert in added)
        self.watch.set(bool(self._layers))
        self._regroup()

    def follow(self) -> None:
        """Update groups and gates if stacks or base weights were moved, cast or loaded since the last call."""
        # A product that a group has computed but not used up was made with weights that are no longer set.
        self.gates.clear()
        if not self.groups.is_current():
            self._regroup()
        elif not self._gates_fit():
            self._lay_out()

    def _regroup(self) -> None:
        self._layers, num_failed = self.groups.regroup(self._layers)
        self._lay_out()
        if num_failed:
            warnings.warn(
                f"memory ran out for {num_failed} of {len(self.groups.slots)} groups of layers, so the layers of these "
                "groups are computed one by one: this is slower, but the answers are the same",
                RuntimeWarning,
                stacklevel=2,
            )

    def _lay_out(self) -> None:
        self.gates.lay_out(list(self._experts), [layer.stack for layer in self._layers.values()], self.groups.slots)

    def _stack_of(self, name: str, fresh: Sequence[Member], gone: set[str]) -> Stack | None:
        """Return a layer's new stack; None if no expert adapts the layer any more.

        If the layer's experts do not change, the old stack is returned, as the same object.
        """
        layer = self._layers.get(name)
        held = [] if layer is None else layer.stack.members()
        kept = [member for member in held if member.expert not in gone]
        # Groups compare stacks by identity, and rebuild their buffers if a stack is a new object.
        if layer is not None and not fresh and len(kept) == len(held):
            return layer.stack
        # The experts of a stack are sorted by name, as those of the model are.
        members = sorted([*kept, *fresh], key=lambda member: member.expert)
        if not members:
            return None
        return Stack.of(members, self._model.dtype, _device_of(bare_layer(self._model, name, self.gates)))

    def _put(self, name: str, stack: Stack | None) -> None:
        """Give a layer its stack, and wrap the layer if it is not wrapped yet. With None, put the base layer back."""
        layer = self._layers.get(name)
        if layer is not None and stack is not None:
            if layer.stack is not stack:
                layer.put(stack)
            return
        parent_name, _, leaf = name.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        if stack is None:
            assert layer is not None
            setattr(parent, leaf, layer.base_layer)
            del self._layers[name]
        else:
            self._layers[name] = MixedLinear(getattr(parent, leaf), name, self.gates, stack)
            setattr(parent, leaf, self._layers[name])

    def _gates_fit(self) -> bool:
        """Return whether the gates have the dtype and device of the first layer's stack."""
        first = next(iter(self._layers.values()), None)
        # Only the first layer is checked, because this runs in every forward pass.
        return first is None or self.gates.is_like(first.stack.a_CI)


def _device_of(layer: Any) -> torch.device:
    # `layer.weight` would not do: a quantized layer may have no `weight`, or one of a special type.
    first: Tensor = next(chain(layer.parameters(), layer.buffers()))
    return first.device
