"""The layers of a model that its experts adapt: wrapped, and wrapped anew, as experts come and go."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from personalized_soups.adapters.library import Expert
from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.launching.threads import in_order, num_workers
from personalized_soups.mixing.cache_keys import CacheKeys
from personalized_soups.mixing.experts import Members, bare_layer, check_experts
from personalized_soups.mixing.gates import Gates
from personalized_soups.mixing.groups import LayerGroup, arranged, new_group, storages_of, units
from personalized_soups.mixing.layer import MixedLinear
from personalized_soups.mixing.stack import Member, Stack


class MixedLayers:
    """Every wrapped layer of a model, the experts whose stacks they hold, and the gates that they share.

    Args:
        model: of transformers; its layers are replaced.
    """

    def __init__(self, model: Any) -> None:
        self.gates = Gates()
        self._model = model
        self._layers: dict[str, MixedLinear] = {}
        self._units: list[list[int]] = []
        self._groups: list[LayerGroup] = []
        self._experts: dict[str, Expert] = {}
        self.cache_keys = CacheKeys()
        self._hook: RemovableHandle | None = None
        self.when_moved: Callable[[], None] = self.follow

    @property
    def experts(self) -> Mapping[str, Expert]:
        """The experts by name, sorted."""
        return MappingProxyType(self._experts)

    def cache_key(self, weights: ExpertWeights) -> str:
        """Return the key under which a prompt's keys and values may be cached, if it is read with these weights."""
        return self.cache_keys.of(weights, self._model.dtype)

    @property
    def by_name(self) -> Mapping[str, MixedLinear]:
        """The wrapped layers, by their names in the base, in the order of their slots."""
        return MappingProxyType(self._layers)

    @property
    def num_bytes(self) -> int:
        """Bytes of all stacks, and of the room that groups keep for more."""
        stacks = sum(layer.stack.num_bytes for layer in self._layers.values())
        return stacks + sum(group.num_spare_bytes for group in self._groups)

    def change(self, added: Sequence[Expert], removed: Iterable[str] = (), *, same_base: bool = False) -> None:
        """Take experts in and out; one that is added takes the place of that of its name. All or nothing.

        Only layers that one of them adapts get another stack; what stays is not read again.

        Raises:
            SoupError: as check_experts and Members.of.
        """
        gone = {*removed, *(expert.name for expert in added)}
        kept = {name: expert for name, expert in self._experts.items() if name not in gone}
        check_experts([*kept.values(), *added], self._model, self.gates, same_base=same_base)
        fresh = Members(added, self._model, self.gates, self._model.dtype)
        names = sorted({*self._layers, *fresh.modules})

        def stack_of(name: str) -> Stack | None:
            return self._stack_of(name, fresh.of(name) if name in fresh.modules else [], gone)

        stacks = list(in_order(stack_of, names, num_workers(torch.device("cpu"))))
        # from here on nothing raises, except a warning that the user has turned into an error
        gone_layers = {self._layers[name] for name, stack in zip(names, stacks, strict=True) if stack is None}
        for group in self._groups:
            if not gone_layers.isdisjoint(group.layers):
                group.dissolve()
        self._groups = [group for group in self._groups if gone_layers.isdisjoint(group.layers)]
        for name, stack in zip(names, stacks, strict=True):
            self._put(name, stack)
        self._experts = dict(sorted({**kept, **{expert.name: expert for expert in added}}.items()))
        self.cache_keys.keep(self._experts)
        self.cache_keys.renew(expert.name for expert in added)
        self._hook_up()
        self._regroup()

    def follow(self) -> None:
        """Let groups and gates be where the stacks and the base's weights are: models are moved, cast and loaded."""
        self.gates.clear()
        if not all(group.is_current() for group in self._groups):
            self._regroup()
        elif not self._is_followed():
            self._lay_out()

    def _regroup(self) -> None:
        """Let layers that read the same input be computed together, as far as they can be, and give all their slots.

        Slots follow the layers' names alone: a mixture that is set holds weights by slot.
        """
        names = arranged(self._layers)
        found = [unit for alike in names for unit in units([self._layers[name] for name in alike])]
        # a tensor that is made in inference mode could not be changed, or trained, outside of it
        with torch.inference_mode(False), torch.no_grad():
            before = {group.layers: group for group in self._groups if group.has_these_bases()}
            for group in self._groups:
                if group.layers not in found or group.layers not in before:
                    group.dissolve()
            self._groups = [before[unit] for unit in found if unit in before]
            failed = self._group(found, before)
        self._layers = {name: self._layers[name] for alike in names for name in alike}
        for slot, layer in enumerate(self._layers.values()):
            layer.slot = slot
        self._units = [[layer.slot for layer in unit] for unit in found]
        self._lay_out()
        if failed:
            warnings.warn(
                f"memory ran out for {failed} of {len(found)} groups of layers: their layers are computed one by one, "
                "which is slower and gives the same answers",
                RuntimeWarning,
                stacklevel=2,
            )

    def _group(
        self, found: Sequence[tuple[MixedLinear, ...]], before: Mapping[tuple[MixedLinear, ...], LayerGroup]
    ) -> int:
        """Make the groups that are missing, let the others hold the stacks that are new, and return how many failed."""
        storages = storages_of(self._model)

        def grouped(unit: tuple[MixedLinear, ...]) -> LayerGroup | RuntimeError | None:
            group = before.get(unit)
            try:
                if group is None:
                    return new_group(unit, self.gates, storages)
                if not group.has_these_stacks():
                    group.hold()
            except RuntimeError as error:  # torch's own, where memory runs out, on a GPU or not
                if group is not None:
                    group.dissolve()
                return error
            return group

        # on a GPU by the caller alone, on the caller's stream
        is_on_gpu = any(layer.stack.a_CI.is_cuda for unit in found for layer in unit)
        made = list(in_order(grouped, found, 1 if is_on_gpu else num_workers(torch.device("cpu"))))
        if is_on_gpu:
            torch.cuda.empty_cache()  # where the weights stood before
        self._groups = [group for group in made if isinstance(group, LayerGroup)]
        return sum(isinstance(each, RuntimeError) for each in made)

    def _lay_out(self) -> None:
        self.gates.lay_out(list(self._experts), [layer.stack for layer in self._layers.values()], self._units)

    def _stack_of(self, name: str, fresh: Sequence[Member], gone: set[str]) -> Stack | None:
        """Return a layer's new stack, None where no expert is left; a stack that nothing changes is the old one."""
        layer = self._layers.get(name)
        held = [] if layer is None else layer.stack.members()
        kept = [member for member in held if member.expert not in gone]
        if layer is not None and not fresh and len(kept) == len(held):
            return layer.stack
        members = sorted([*kept, *fresh], key=lambda member: member.expert)
        if not members:
            return None
        return Stack.of(members, self._model.dtype, _device_of(bare_layer(self._model, name, self.gates)))

    def _put(self, name: str, stack: Stack | None) -> None:
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

    def _hook_up(self) -> None:
        """Look at each forward of the model as long as layers are wrapped."""
        if self._layers and self._hook is None:
            self._hook = self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        elif not self._layers and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_forward(self, _model: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """Count the tokens, and see whether the model was moved or cast while weights are set."""
        if torch.compiler.is_compiling():
            return
        self.gates.clear()
        given = keywords.get("input_ids", arguments[0] if arguments else None)
        if given is not None:
            self.gates.num_tokens = given.numel()
        elif (embedded := keywords.get("inputs_embeds")) is not None:
            self.gates.num_tokens = embedded.shape[:-1].numel()
        if self.gates.is_on and not self._is_followed():
            self.when_moved()

    def _is_followed(self) -> bool:
        first = next(iter(self._layers.values()), None)
        return first is None or self.gates.is_like(first.stack.a_CI)


def _device_of(layer: Any) -> torch.device:
    # quantised layers hold their weights under other names
    first: Tensor = next(chain(layer.parameters(), layer.buffers()))
    return first.device
