"""Where the rows of a running batch keep their keys and values: a slot for each row, a column for each token.

S slots, N rows of a forward pass, Q tokens of each, T columns, W columns that are looked at, H heads, D their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from personalized_soups.errors import UsageError

# Room is made in steps: so many columns, and this many slots beyond a power of two.
_COLUMNS = 64
_SLOTS = 16

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, eq=False, slots=True)
class Placement:
    """Where the tokens of one forward pass go: rows are the slots `first`, `first + 1`, ...

    Args:
        first: the first row's slot.
        columns_NQ: int64, the column of every token; padding goes to the last one, which nobody looks at.
        width: columns that are looked at.
    """

    first: int
    columns_NQ: Tensor  # noqa: N815
    width: int


class _SlotLayer(CacheLayerMixin):
    """One layer's keys and values, `[S, H, T, D]`."""

    is_compileable = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: Slots) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, as wide as the model's heads are."""
        room = (self._slots.num_slots, key_states.shape[1], self._slots.num_columns)
        # zeros: what is masked is multiplied by 0, and memory as it is found may hold NaN
        self.keys = key_states.new_zeros(*room, key_states.shape[3])
        self.values = value_states.new_zeros(*room, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `[N, H, Q, D]` where the placement says, and return views `[N, H, W, D]` of what the rows have."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        placement = self._slots.placement
        rows = slice(placement.first, placement.first + key_states.shape[0])
        found = []
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            here = held[rows]
            index = placement.columns_NQ[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            here.scatter_(2, index, new)
            found.append(here[:, :, : placement.width])
        return found[0], found[1]

    def resize(self, num_slots: int, num_columns: int, num_used: int) -> None:
        """Take the first columns along into more room."""
        if self.is_initialized:
            for name in ("keys", "values"):
                old: Tensor = getattr(self, name)
                new = old.new_zeros(num_slots, old.shape[1], num_columns, old.shape[3])
                new[: old.shape[0], :, :num_used] = old[:, :, :num_used]
                setattr(self, name, new)

    def move(self, source: int, target: int, num_columns: int) -> None:
        """Put a slot's first columns into another one."""
        for held in (self.keys, self.values):
            held[target, :, :num_columns] = held[source, :, :num_columns]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns are looked at, and from which on."""
        return self._slots.placement.width, 0

    def get_seq_length(self) -> int:
        """Return nothing that counts: every row has a length of its own, and positions are given."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1


class Slots:
    """The keys and values of a batch: room that grows, written in place; `cache` is what a model is given.

    Args:
        config: of the model, which says how many layers there are and of which kind.

    Raises:
        UsageError: if a layer keeps no keys and values for each token (a recurrent one).
    """

    def __init__(self, config: Any) -> None:
        text = config.get_text_config(decoder=True)
        self.kinds = layer_kinds(text)
        self.num_slots = 0
        self.num_columns = 0
        self._num_used = 0  # columns in which a row has a token
        self.placement = Placement(0, torch.zeros(0, 0, dtype=torch.int64), 0)
        self._window = int(getattr(text, "sliding_window", None) or 0)
        self._is_eager = text._attn_implementation == "eager"
        self._layers = [_SlotLayer(self) for _ in range(text.num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values that there is room for."""
        return sum(layer.num_bytes for layer in self._layers)

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """Make room for so many rows of so many tokens. What is held stays."""
        if num_slots > self.num_slots or num_tokens >= self.num_columns:
            self.num_slots = max(self.num_slots, _rounded_slots(num_slots))
            self.num_columns = max(self.num_columns, _rounded_columns(num_tokens))
            for layer in self._layers:
                layer.resize(self.num_slots, self.num_columns, self._num_used)

    def clear(self) -> None:
        """Let go of all room."""
        self.num_slots = self.num_columns = self._num_used = 0
        for layer in self._layers:
            layer.is_initialized = False
            layer.keys = layer.values = torch.zeros(0)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Put a slot's tokens into another slot."""
        for layer in self._layers:
            layer.move(source, target, num_tokens)

    def place(self, first: int, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Say where the next forward pass writes, and return what the model is to be told.

        Args:
            first: the first row's slot; the others follow.
            starts: of each row, how many tokens it has already.
            lengths: of each row, how many come now; they stand at the right of `[N, Q]`, padding at their left.
            device: of the model.

        Returns:
            `past_key_values`, `position_ids` `[N, Q]`, and `attention_mask` `[N, 1, Q, W]`, or one for each kind of
            layer.
        """
        most = max(lengths)
        width = max(start + length for start, length in zip(starts, lengths, strict=True))
        self.reserve(first + len(starts), width)
        self._num_used = max(self._num_used, width)
        ends_N1 = torch.tensor([start + length for start, length in zip(starts, lengths, strict=True)])[:, None]
        positions_NQ = ends_N1 - torch.arange(most, 0, -1)[None, :]
        is_padding_NQ = positions_NQ < torch.tensor(starts)[:, None]
        columns_NQ = positions_NQ.masked_fill(is_padding_NQ, self.num_columns - 1).to(device)
        # padding looks at the first token, so that what comes of it is finite
        positions_NQ = positions_NQ.masked_fill(is_padding_NQ, 0).to(device)
        self.placement = Placement(first, columns_NQ, width)
        return {
            "past_key_values": self.cache,
            "position_ids": positions_NQ,
            "attention_mask": self._masks(positions_NQ, width, device),
        }

    def _masks(self, positions_NQ: Tensor, width: int, device: torch.device) -> Tensor | dict[str, Tensor]:
        back_NQW = positions_NQ[:, :, None] - torch.arange(width, device=device)
        is_seen = back_NQW >= 0
        masks = {kind: is_seen if kind == "full_attention" else is_seen & (back_NQW < self._window)
                 for kind in self.kinds}  # fmt: skip
        shaped = {kind: self._as_told(mask[:, None]) for kind, mask in masks.items()}
        return shaped if len(shaped) > 1 else next(iter(shaped.values()))

    def _as_told(self, mask: Tensor) -> Tensor:
        """Return a mask as the model's attention wants it: booleans, or what is added to the scores."""
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e30) if self._is_eager else mask


def layer_kinds(text: Any) -> tuple[str, ...]:
    """Return the kinds of attention that a model's layers have, sorted.

    Raises:
        UsageError: if one of them is none that keeps every token's keys and values.
    """
    listed = getattr(text, "layer_types", None)
    if listed is None:
        listed = ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"]
    unknown = sorted(set(listed) - _KNOWN_LAYERS)
    if unknown:
        raise UsageError(
            f"the model has layers of {', '.join(unknown)}, whose rows can't join and leave a batch here",
            where="base",
            mend="take a model of full or sliding attention, or answer in batches: psoups generate --profiles",
        )
    return tuple(sorted(set(listed)))


def room_for(num_slots: int, num_tokens: int) -> int:
    """Return for how many tokens in all there is room, once there is for so many rows of so many tokens."""
    return _rounded_slots(num_slots) * _rounded_columns(num_tokens)


def _rounded_slots(count: int) -> int:
    return 1 << (count - 1).bit_length() if count <= _SLOTS else -(-count // _SLOTS) * _SLOTS


def _rounded_columns(num_tokens: int) -> int:
    # one more than tokens: the last column is for padding
    return -(-(num_tokens + 1) // _COLUMNS) * _COLUMNS
