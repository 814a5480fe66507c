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

# Sets of used experts whose spans are remembered.
_KEPT_SPANS = 32


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
        self._register_load_state_dict_pre_hook(self._named_as_held)  # type: ignore[no-untyped-call]
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
        # no-ops but where a model stands on several devices, or has layers of several dtypes
        like = self.stack.a_CI
        gate_GC = gates.of(self.slot).to(like.device, like.dtype)
        if gates.token_rows is not None:
            self._check_tokens(x, gates.token_rows)
            gate_GC = gate_GC.index_select(0, gates.token_rows.to(like.device).flatten())
        elif gates.rows_each is not None:
            self._check_rows(x, gate_GC.shape[0], gates.rows_each)
        if torch.is_grad_enabled():
            gate_GC = gate_GC.clone()  # autograd keeps it, and the next mixture is written into the same buffer
        spans = self._whole if torch.compiler.is_compiling() else self._used(gates.used)
        bias_O = getattr(self.base_layer, "bias", None)
        return mixed(x.to(like.dtype), y, self.stack, spans, gate_GC, bias_O=bias_O)

    def _used(self, used: frozenset[str]) -> tuple[Span, ...]:
        found = self._spans.get(used)
        if found is None:
            if len(self._spans) >= _KEPT_SPANS:
                self._spans.clear()
            with torch.inference_mode(False):
                found = self._spans[used] = self.stack.spans(used)
        return found

    def _check_tokens(self, x: Tensor, token_rows: Tensor) -> None:
        """Raise unless x is of the tokens that `token_rows` speaks of."""
        is_flat = x.dim() < 3
        if x.shape[:-1] != (token_rows.flatten().shape if is_flat else token_rows.shape):
            raise UsageError(
                f"{self.name} is given tokens of the shape {list(x.shape[:-1])}, rows has {list(token_rows.shape)}",
                where="rows",
                mend="give rows=... of the shape of input_ids",
            )

    def _check_rows(self, x: Tensor, num_gates: int, rows_each: int) -> None:
        """Raise unless x has the rows that the gates are for."""
        if x.dim() < 3:
            # laid out flat: a layer that sees some of the tokens alone cannot tell whose they are
            have, want = x.shape[0], self.gates.num_tokens
            if have % num_gates == 0 and (have == want or torch.compiler.is_compiling()):
                return
            raise UsageError(
                f"{self.name} is given {have} tokens laid out flat, the batch has {want}",
                where=self.name,
                mend="run one profile at a time; a layer to which some of the tokens are sent can't be mixed",
            )
        if x.shape[0] != num_gates * rows_each:
            raise UsageError(
                f"the mixture is for {num_gates} prompts of {rows_each} rows each, the batch has {x.shape[0]} rows",
                where="profiles",
                mend="give one profile for each prompt; with beams or several answers a prompt, "
                "mixture(..., rows_each=N)",
            )

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
            self.put(self.stack.moved(probe.dtype, probe.device))
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
