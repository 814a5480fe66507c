"""A wrapped linear layer of the base, which adds each row's soup to the output.

Shapes: G = gates, C = columns of the layer's gates, but in `a_CI` rows of its distinct A's, I = in_features,
O = out_features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from personalized_soups.mixing.layers.arithmetic import mixed
from personalized_soups.mixing.layers.gates import Gates
from personalized_soups.mixing.layers.stack import Span, Stack

# The maximum number of sets of used experts for which a layer keeps the spans.
_KEPT_SPANS = 32


class Group(Protocol):
    """The methods of a `groups.LayerGroup` that a layer calls: a group of layers that share one matrix product."""

    # True if `take` returns a layer's whole output, False if `take` returns only `A x`.
    has_weights: bool

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """Return the part of the product for the layer at `place`; None if that layer must compute separately."""

    def dissolve(self) -> None:
        """Make every layer compute separately from now on."""


class MixedLinear(nn.Module):
    """Wraps a linear layer of the base, and adds each row's soup to the layer's output.

    The layer may be of any kind, such as transformers' Conv1D or a quantized layer, because only its output is changed.
    While no weights are set, the output is bit for bit that of the base layer. An attribute that MixedLinear does not
    define is looked up in the base layer (`weight`, `in_features`, ...).

    Args:
        base_layer: the base's own layer.
        name: the layer's name in the base.
        gates: the gates of the model, which all its layers share.
        stack: the factors of the experts that adapt the layer.
    """

    def __init__(self, base_layer: nn.Module, name: str, gates: Gates, stack: Stack) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.gates = gates
        self.slot = -1  # the layer's number among all wrapped layers; set by `LayerGroups`
        self.group: Group | None = None  # set by the group
        self.place = 0  # the layer's number in its group
        # A new module starts in training mode, but the model may be in evaluation mode.
        self.train(base_layer.training)
        # Checkpoints have the base's names of tensors, without `base_layer`.
        self._register_load_state_dict_pre_hook(self._named_as_held)  # type: ignore[no-untyped-call]
        self.put(stack)

    def put(self, stack: Stack, whole: Span | None = None) -> None:
        """Replace the stack. If the caller has computed `stack.whole()` already, it can be given as `whole`."""
        self._whole = (stack.whole() if whole is None else whole,)
        self.stack = stack
        # Spans depend only on the set of used experts, and batches have few different sets.
        self._spans: dict[frozenset[str], tuple[Span, ...]] = {}

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Return the base layer's output, with each row's soup added. The shape is that of the base layer's output.

        Raises:
            UsageError: if the number of rows in the batch is not that of the mixture.
        """
        gates, group = self.gates, self.group
        if not gates.is_on:
            bare: Tensor = self.base_layer(x, *arguments, **keywords)
            return bare
        # With further arguments, the base layer may compute more than `W x`, so the group is not used.
        part = None if group is None or arguments or keywords else group.take(self.place, x)
        if part is not None and group is not None and group.has_weights:
            return part
        y: Tensor = self.base_layer(x, *arguments, **keywords)
        # `to` copies only if the model's layers are on several devices or have several dtypes.
        like = self.stack.a_CI
        gate_GC = gates.fitted(x, gates.of(self.slot).to(like.device, like.dtype), self.name)
        if torch.is_grad_enabled():
            gate_GC = gate_GC.clone()  # the backward pass needs the gates, but the next mixture overwrites the buffer
        # Compiled code always computes all experts, so that it need not be compiled again for another set of experts.
        is_whole = part is not None or torch.compiler.is_compiling()
        spans = self._whole if is_whole else self._used(gates.used)
        bias_O = getattr(self.base_layer, "bias", None)
        return mixed(x.to(like.dtype), y, self.stack, spans, gate_GC, bias_O=bias_O, ax=part)

    def _used(self, used: frozenset[str]) -> tuple[Span, ...]:
        spans = self._spans.get(used)
        if spans is None:
            if len(self._spans) >= _KEPT_SPANS:
                self._spans.clear()
            with torch.inference_mode(False):
                spans = self._spans[used] = self.stack.spans(used)
        return spans

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the base layer's state, so that a saved model is a checkpoint of the base, with the base's names."""
        state: dict[str, Any] = self.base_layer.state_dict(*arguments, **keywords)
        return state

    def _named_as_held(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before a state is loaded, rename the base's tensors to their names within this wrapper."""
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}base_layer.{name.removeprefix(prefix)}"] = state.pop(name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or cast the stack together with the layer."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A model that is cast in inference mode may be trained or mixed outside of it later.
        with torch.inference_mode(False), torch.no_grad():
            probe = fn(self.stack.a_CI[:1])  # one row is enough to find the new dtype and device
            if self.group is not None and (probe.dtype, probe.device) != (
                self.stack.a_CI.dtype,
                self.stack.a_CI.device,
            ):
                self.group.dissolve()  # otherwise the group's buffers would keep the old memory in use
            self.put(self.stack.moved(probe.dtype, probe.device))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
