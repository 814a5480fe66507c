"""A linear layer of the base that adds every row's own soup to what the base makes of it.

G gates, C columns of a layer's gates, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from personalized_soups.mixing.arithmetic import mixed
from personalized_soups.mixing.gates import Gates
from personalized_soups.mixing.stack import Span, Stack

# Sets of used experts whose spans are remembered.
_KEPT_SPANS = 32


class Group(Protocol):
    """Layers that read the same input and share one product; `groups.LayerGroup` is one."""

    # whether `take` returns a layer's whole output, and not its `A x` alone
    has_weights: bool

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """Return the part of the layer at `place`; None where that layer must compute by itself."""

    def dissolve(self) -> None:
        """Let every layer compute by itself from now on."""


class MixedLinear(nn.Module):
    """Wraps a linear layer of any kind (transformers' Conv1D, a quantised one): it touches inputs and outputs only.

    While no soup is set it returns what the base's layer returns, to the bit. Attributes that it lacks are that
    layer's (`weight`, `in_features`, ...), for code that looks at them.

    Args:
        base_layer: the layer.
        name: its name in the base.
        gates: of the whole model, shared by all of its layers.
        stack: the experts' factors; `in_features` columns of A.
    """

    def __init__(self, base_layer: nn.Module, name: str, gates: Gates, stack: Stack) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.gates = gates
        self.slot = -1  # its place among the gates, which the model gives
        self.group: Group | None = None  # takes itself the layers that it computes
        self.place = 0  # in the group
        self.train(base_layer.training)
        self._register_load_state_dict_pre_hook(self._named_as_held)  # type: ignore[no-untyped-call]
        self.put(stack)

    def put(self, stack: Stack, whole: Span | None = None) -> None:
        """Hold another stack; `whole` is its `whole()`, where that is made already."""
        self._whole = (stack.whole() if whole is None else whole,)
        self.stack = stack
        self._spans: dict[frozenset[str], tuple[Span, ...]] = {}

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Return the base's output with each row's soup added; shapes are those of the base's layer.

        Raises:
            UsageError: if the batch has other rows than the mixture that is set.
        """
        gates, group = self.gates, self.group
        if not gates.is_on:
            bare: Tensor = self.base_layer(x, *arguments, **keywords)
            return bare
        part = None if group is None or arguments or keywords else group.take(self.place, x)
        if part is not None and group is not None and group.has_weights:
            return part
        y: Tensor = self.base_layer(x, *arguments, **keywords)
        # no-ops but where a model stands on several devices, or has layers of several dtypes
        like = self.stack.a_CI
        gate_GC = gates.fitted(x, gates.of(self.slot).to(like.device, like.dtype), self.name)
        if torch.is_grad_enabled():
            gate_GC = gate_GC.clone()  # autograd keeps it, and the next mixture is written into the same buffer
        is_whole = part is not None or torch.compiler.is_compiling()
        spans = self._whole if is_whole else self._used(gates.used)
        bias_O = getattr(self.base_layer, "bias", None)
        return mixed(x.to(like.dtype), y, self.stack, spans, gate_GC, bias_O=bias_O, low=part)

    def _used(self, used: frozenset[str]) -> tuple[Span, ...]:
        found = self._spans.get(used)
        if found is None:
            if len(self._spans) >= _KEPT_SPANS:
                self._spans.clear()
            with torch.inference_mode(False):
                found = self._spans[used] = self.stack.spans(used)
        return found

    def state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the base layer's state, by its own names: what is saved is the base's checkpoint."""
        found: dict[str, Any] = self.base_layer.state_dict(*arguments, **keywords)
        return found

    def _named_as_held(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before loading: give the base's names those that they have below the wrapper."""
        for name in [name for name in state if name.startswith(prefix)]:
            state[f"{prefix}base_layer.{name.removeprefix(prefix)}"] = state.pop(name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or cast the stack with the layer, as the model is."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.inference_mode(False), torch.no_grad():
            probe = fn(self.stack.a_CI[:1])
            if self.group is not None and (probe.dtype, probe.device) != (
                self.stack.a_CI.dtype,
                self.stack.a_CI.device,
            ):
                self.group.dissolve()  # its buffers would keep the memory that is to be freed
            self.put(self.stack.moved(probe.dtype, probe.device))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
