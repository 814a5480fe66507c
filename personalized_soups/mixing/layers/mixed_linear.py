"""A linear layer of the base that adds each row's soup to its output.

G gates, C columns of a layer's gates, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from personalized_soups.mixing.layers.arithmetic import mixed
from personalized_soups.mixing.layers.gates import Gates
from personalized_soups.mixing.layers.stack import Span, Stack

# For how many sets of used experts a layer remembers the spans.
_KEPT_SPANS = 32


class Group(Protocol):
    """Layers that read the same input and share one product; `groups.LayerGroup` is one."""

    # Whether `take` returns a layer's whole output; otherwise it returns `A x` alone.
    has_weights: bool

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """Return the part of the layer at `place`; None if that layer must compute separately."""

    def dissolve(self) -> None:
        """Let every layer compute separately from now on."""


class MixedLinear(nn.Module):
    """Wraps a linear layer of any kind, such as transformers' Conv1D or a quantised layer: it only adds to the output.

    While no soup is set, it returns the base layer's output, to the bit. Attributes that it lacks are those of the
    base's layer (`weight`, `in_features`, ...).

    Args:
        base_layer: the layer.
        name: the layer's name in the base.
        gates: of the model, shared by all of its layers.
        stack: the experts' factors; A has `in_features` columns.
    """

    def __init__(self, base_layer: nn.Module, name: str, gates: Gates, stack: Stack) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.gates = gates
        self.slot = -1  # the layer's number among the gates; set by `LayerGroups`
        self.group: Group | None = None  # set by the group
        self.place = 0  # the layer's number in its group
        # A new module is in training mode, even in a model that is not.
        self.train(base_layer.training)
        # Checkpoints have the base's names, without `base_layer`.
        self._register_load_state_dict_pre_hook(self._named_as_held)  # type: ignore[no-untyped-call]
        self.put(stack)

    def put(self, stack: Stack, whole: Span | None = None) -> None:
        """Replace the stack. `whole` is `stack.whole()`, if the caller has it already."""
        self._whole = (stack.whole() if whole is None else whole,)
        self.stack = stack
        # Spans depend on the set of used experts alone, and batches repeat few sets.
        self._spans: dict[frozenset[str], tuple[Span, ...]] = {}

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Return the base layer's output with each row's soup added, in the base layer's shape.

        Raises:
            UsageError: if the batch does not have the rows of the mixture that is set.
        """
        gates, group = self.gates, self.group
        if not gates.is_on:
            bare: Tensor = self.base_layer(x, *arguments, **keywords)
            return bare
        # A layer that is called with further arguments is no plain linear map.
        part = None if group is None or arguments or keywords else group.take(self.place, x)
        if part is not None and group is not None and group.has_weights:
            return part
        y: Tensor = self.base_layer(x, *arguments, **keywords)
        # Copies only for a model on several devices, or with layers of several dtypes.
        like = self.stack.a_CI
        gate_GC = gates.fitted(x, gates.of(self.slot).to(like.device, like.dtype), self.name)
        if torch.is_grad_enabled():
            gate_GC = gate_GC.clone()  # autograd keeps the gates, but the next mixture overwrites their buffer
        # Compiled code always takes all experts, so that another set of experts compiles nothing again.
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
        """Return the base layer's state under the base's names, so that a saved model is the base's checkpoint."""
        state: dict[str, Any] = self.base_layer.state_dict(*arguments, **keywords)
        return state

    def _named_as_held(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before loading, rename the base's tensors to their names within the wrapper."""
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}base_layer.{name.removeprefix(prefix)}"] = state.pop(name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or cast the stack together with the layer."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # A model may be cast in inference mode, and trained or mixed later.
        with torch.inference_mode(False), torch.no_grad():
            probe = fn(self.stack.a_CI[:1])  # one row shows the new dtype and device
            if self.group is not None and (probe.dtype, probe.device) != (
                self.stack.a_CI.dtype,
                self.stack.a_CI.device,
            ):
                self.group.dissolve()  # otherwise its buffers would keep the old memory
            self.put(self.stack.moved(probe.dtype, probe.device))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
