"""Keys and values of a running batch: a slot for each row, a column for each token.

S slots, N rows of a forward pass, Q tokens of each, T columns, W columns that the pass attends to, H heads, D their
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from personalized_soups.serving.engine.attention import check_attention, layer_kinds

# Columns are allocated in multiples of the first number; slots in powers of two up to the second one, and in multiples
# of it beyond.
_COLUMNS = 64
_SLOTS = 16


@dataclass(frozen=True, eq=False, slots=True)
class Placement:
    """Where one forward pass writes its tokens: its rows are the slots `first`, `first + 1`, ...

    Attributes:
        first: the slot of the first row.
        columns_NQ: int64, the column of every token. Padding is written to the last column, which no row attends to.
        width: number of columns that the pass attends to.
    """

    first: int
    columns_NQ: Tensor  # noqa: N815
    width: int


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `[S, H, T, D]`."""

    is_compileable = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: KvSlots) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate keys and values with the heads' width."""
        shape = (self._slots.num_slots, key_states.shape[1], self._slots.num_columns)
        # zeros: masked keys are multiplied by 0, and uninitialized memory may hold NaN
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Write `[N, H, Q, D]` where the placement says, and return views `[N, H, W, D]` of the rows' columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        placement = self._slots.placement
        rows = slice(placement.first, placement.first + key_states.shape[0])
        views = []
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            row_view = stored[rows]
            index = placement.columns_NQ[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
            row_view.scatter_(2, index, new)
            views.append(row_view[:, :, : placement.width])
        return views[0], views[1]

    def resize(self, num_slots: int, num_columns: int, num_used: int) -> None:
        """Allocate another number of slots and columns, and copy the first `num_used` columns of the slots."""
        if self.is_initialized:
            for name in ("keys", "values"):
                old: Tensor = getattr(self, name)
                new = old.new_zeros(num_slots, old.shape[1], num_columns, old.shape[3])
                kept = slice(min(num_slots, old.shape[0]))
                new[kept, :, :num_used] = old[kept, :, :num_used]
                setattr(self, name, new)

    def narrow(self, num_slots: int, num_columns: int) -> None:
        """Use at most so many slots and columns; the memory of the others stays allocated."""
        if self.is_initialized:
            self.keys = self.keys[:num_slots, :, :num_columns]
            self.values = self.values[:num_slots, :, :num_columns]

    def move(self, source: int, target: int, num_columns: int) -> None:
        """Copy the first columns of one slot into another slot."""
        for stored in (self.keys, self.values):
            stored[target, :, :num_columns] = stored[source, :, :num_columns]

    def wipe(self, slots: slice, columns: slice) -> None:
        """Fill with zeros."""
        if self.is_initialized:
            self.keys[slots, :, columns] = 0
            self.values[slots, :, columns] = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns the pass attends to, and the first of them."""
        return self._slots.placement.width, 0

    def get_seq_length(self) -> int:
        """Return 0: rows differ in length, and `place` gives the positions to the model."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: the layer grows without limit."""
        return -1


class KvSlots:
    """The keys and values of a batch: memory that grows and is written in place.

    Columns that a row has not written hold zeros. Attention multiplies masked columns by 0, and NaN or infinities of a
    row that has left would survive that. So a slot is wiped before another row uses it.

    Attributes:
        cache: the cache that the model is called with.
        kinds: the kinds of attention of the model's layers.
        num_slots: allocated slots.
        num_columns: allocated columns of each slot.
        placement: where the next forward pass writes.

    Args:
        config: configuration of the model.
        max_bytes: limit for the allocated bytes, as long as the requested rows fit into it; None for no limit. While
            the memory is resized, the old memory of one layer is allocated in addition.

    Raises:
        UsageError: if a layer does not keep keys and values of each token (recurrent layers), or ignores masks.
    """

    def __init__(self, config: Any, max_bytes: int | None = None) -> None:
        text = config.get_text_config(decoder=True)
        check_attention(text)
        self.kinds = layer_kinds(text)
        self.num_slots = 0
        self.num_columns = 0
        self.placement = Placement(0, torch.zeros(0, 0, dtype=torch.int64), 0)
        self._max_bytes = max_bytes
        self._written: list[int] = []  # for each slot, how many columns are not zeros
        self._window = int(getattr(text, "sliding_window", None) or 0)
        self._is_eager = text._attn_implementation == "eager"
        self._layers = [_SlotLayer(self) for _ in range(text.num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))

    @property
    def num_bytes(self) -> int:
        """Bytes allocated in all layers."""
        return sum(layer.num_bytes for layer in self._layers)

    def fits(self, num_slots: int, num_tokens: int, token_bytes: int) -> bool:
        """Return whether memory for `num_slots` rows of `num_tokens` tokens stays within the limit.

        Args:
            num_slots: rows.
            num_tokens: tokens of each row.
            token_bytes: bytes of the keys and values of one token, in all layers.
        """
        num_entries = _rounded_slots(num_slots) * _rounded_columns(num_tokens)
        return self._max_bytes is None or num_entries * token_bytes <= self._max_bytes

    def fit(self, num_slots: int, num_tokens: int) -> None:
        """Allocate memory for rows, and free memory that they do not need if the limit requires it.

        Args:
            num_slots: rows in use, including those that are read next.
            num_tokens: tokens of the longest row, including those that it will get.
        """
        slots = max(self.num_slots, _rounded_slots(num_slots))
        columns = max(self.num_columns, _rounded_columns(num_tokens))
        allocated = self.num_slots * self.num_columns
        if self._max_bytes is not None and allocated and slots * columns * self.num_bytes > self._max_bytes * allocated:
            # rows that have left needed more slots or columns: shrink to what the present rows need
            slots, columns = _rounded_slots(num_slots), _rounded_columns(num_tokens)
        self._resize(slots, columns)

    def _grow(self, num_slots: int, num_tokens: int) -> None:
        """Allocate memory for rows, even beyond the limit."""
        if num_slots > self.num_slots or num_tokens >= self.num_columns:
            self._resize(
                max(self.num_slots, _rounded_slots(num_slots)), max(self.num_columns, _rounded_columns(num_tokens))
            )

    def _resize(self, num_slots: int, num_columns: int) -> None:
        if (num_slots, num_columns) == (self.num_slots, self.num_columns):
            return
        written = [min(count, num_columns - 1) for count in self._written[:num_slots]]
        try:
            for layer in self._layers:
                layer.resize(num_slots, num_columns, max(written, default=0))
        except Exception:
            # the device's memory is full: use in all layers what the smallest layer has; every row fits into that
            num_slots, num_columns = min(num_slots, self.num_slots), min(num_columns, self.num_columns)
            raise
        finally:
            for layer in self._layers:
                layer.narrow(num_slots, num_columns)
            self.num_slots, self.num_columns = num_slots, num_columns
            self._written = written[:num_slots] + [0] * (num_slots - len(written))

    def clear(self) -> None:
        """Free all memory."""
        self.num_slots = self.num_columns = 0
        self._written = []
        for layer in self._layers:
            layer.is_initialized = False
            layer.keys = layer.values = torch.zeros(0)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a slot's tokens into another slot."""
        stale = slice(num_tokens, self._written[target])
        for layer in self._layers:
            layer.move(source, target, num_tokens)
            if stale.stop > stale.start:
                layer.wipe(slice(target, target + 1), stale)
        self._written[target] = num_tokens

    def _wipe(self, slots: slice) -> None:
        """Fill slots with zeros where earlier rows wrote."""
        stale = max(self._written[slots], default=0)
        if stale:
            for layer in self._layers:
                layer.wipe(slots, slice(stale))

    def place(self, first: int, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Set where the next forward pass writes, and return the arguments for the model.

        Args:
            first: the slot of the first row; the other rows have the slots that follow.
            starts: for each row, how many tokens its slot has already.
            lengths: for each row, how many tokens the pass adds. They are at the right of `[N, Q]`, with padding at
                their left.
            device: of the model.

        Returns:
            `past_key_values`, `position_ids` `[N, Q]`, and `attention_mask` `[N, 1, Q, W]`, or one mask for each kind
            of layer.
        """
        most = max(lengths)
        width = max(start + length for start, length in zip(starts, lengths, strict=True))
        self._grow(first + len(starts), width)
        rows = slice(first, first + len(starts))
        for fresh in [rows] if not any(starts) else [slice(first + row, first + row + 1) for row in _zeros(starts)]:
            self._wipe(fresh)
        self._written[rows] = [start + length for start, length in zip(starts, lengths, strict=True)]
        ends_N1 = torch.tensor([start + length for start, length in zip(starts, lengths, strict=True)])[:, None]
        positions_NQ = ends_N1 - torch.arange(most, 0, -1)[None, :]
        is_padding_NQ = positions_NQ < torch.tensor(starts)[:, None]
        columns_NQ = positions_NQ.masked_fill(is_padding_NQ, self.num_columns - 1).to(device)
        # padding attends to the first token, because a softmax over no column would be NaN
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
        shaped = {kind: self._for_attention(mask[:, None]) for kind, mask in masks.items()}
        return shaped if len(shaped) > 1 else next(iter(shaped.values()))

    def _for_attention(self, mask: Tensor) -> Tensor:
        """Return a mask in the form of the model's attention: booleans, or numbers that are added to the scores."""
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e30) if self._is_eager else mask


def _zeros(numbers: Sequence[int]) -> list[int]:
    return [place for place, number in enumerate(numbers) if number == 0]


def _rounded_slots(count: int) -> int:
    return 1 << (count - 1).bit_length() if count <= _SLOTS else -(-count // _SLOTS) * _SLOTS


def _rounded_columns(num_tokens: int) -> int:
    # one column more than tokens: the last column is for padding
    return -(-(num_tokens + 1) // _COLUMNS) * _COLUMNS
