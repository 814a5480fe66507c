"""A linear layer of the base that adds every row's own soup to what the base makes of it.

G gates, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from personalized_soups.errors import UsageError
from personalized_soups.mixing.arithmetic import mixed
from personalized_soups.mixing.gates import Gates
from personalized_soups.mixing.stack import Span, Stack


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
        self.train(base_layer.training)
        self.put(stack)

    def put(self, stack: Stack) -> None:
        """Hold another stack."""
        self.stack = stack
        self._whole = (stack.whole(),)
        self._spans: dict[frozenset[str], tuple[Span, ...]] = {}

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Return the base's output with each row's soup added; shapes are those of the base's layer.

        Raises:
            UsageError: if the batch has other rows than the mixture that is set.
        """
        y: Tensor = self.base_layer(x, *arguments, **keywords)
        gates = self.gates
        if not gates.is_on:
            return y
        gate_GC = gates.of(self.slot)
        if gate_GC.device != x.device:  # a model that stands on several devices
            gate_GC = gate_GC.to(x.device)
        if gates.token_rows is not None:
            gate_GC = gate_GC.index_select(0, gates.token_rows.to(x.device))
        if gates.token_rows is not None or gates.rows_each is not None:
            self._check_rows(x, gate_GC.shape[0], gates.rows_each or 1)
        spans = self._whole if torch.compiler.is_compiling() else self._used(gates.used)
        held = x if x.dtype == gate_GC.dtype else x.to(gate_GC.dtype)
        return mixed(held, y, self.stack, spans, gate_GC, bias_O=getattr(self.base_layer, "bias", None))

    def _used(self, used: frozenset[str]) -> tuple[Span, ...]:
        found = self._spans.get(used)
        if found is None:
            found = self._spans[used] = self.stack.spans(used)
        return found

    def _check_rows(self, x: Tensor, num_gates: int, rows_each: int) -> None:
        gates = self.gates
        if gates.token_rows is not None or x.dim() < 3:
            # tokens in one row, or laid out flat: a layer that sees some of them alone cannot tell whose they are
            have = x.numel() // x.shape[-1]
            want = num_gates if gates.token_rows is not None else gates.num_tokens
            if have == want and (gates.token_rows is not None or have % num_gates == 0):
                return
            what = f"{self.name} is given {have} tokens, the batch has {want}"
            mend = (
                "give rows=... of the tokens' shape; layers to which a router sends some of the tokens can't be mixed"
            )
        else:
            have, want = x.shape[0], num_gates * rows_each
            if have == want:
                return
            what = f"the mixture is for {num_gates} prompts of {rows_each} rows each, the batch has {have} rows"
            mend = "give one profile for each prompt; with beams or several answers a prompt, mixture(..., rows_each=N)"
        raise UsageError(what, where="profiles", mend=mend)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move or cast the stack with the layer, as the model is."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        probe = fn(self.stack.a_CI[:1])
        self.put(self.stack.moved(probe.dtype, probe.device))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
