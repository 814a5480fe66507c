"""The KV cache of a running batch. Each row of the batch has a slot, and each token of the row has a column in it.

Shapes: S = slots, N = rows of a forward pass, Q = tokens of each row in a forward pass, T = columns of a slot,
W = columns that a forward pass attends to, H = heads, D = width of a head.
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

# Columns are allocated in multiples of _COLUMNS; slots in powers of two up to _SLOTS, then in multiples of _SLOTS.
_COLUMNS = 64
_SLOTS = 16


@dataclass(frozen=True, eq=False, slots=True)
class Placement:
    """Where a forward pass writes keys and values: row n writes into slot `first + n`.

    Attributes:
        first: the slot of the first row.
        columns_NQ: the column of every token, int64. Padding is written into the last column, which no row attends to.
        width: number of columns that the forward pass attends to.
    """

    first: int
    columns_NQ: Tensor  # noqa: N815
    width: int


class _SlotLayer(CacheLayerMixin):
    """The keys and values of one layer, `[S, H, T, D]`."""

    is_compileable = False
    keys: Tensor
    values: Tensor

    def __init__(self, slots: KvSlots) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for the keys and values, with the heads and widths of the given states."""
        shape = (self._slots.num_slots, key_states.shape[1], self._slots.num_columns)
        # zeros, because masked values are multiplied by 0, and uninitialized memory may contain NaN
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a forward pass, `[N, H, Q, D]`, into the columns of `KvSlots.placement`.

        Return views of the keys and values that the pass attends to, `[N, H, W, D]`.
        """
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
        """Allocate new memory for this number of slots and columns, and copy the first `num_used` columns into it."""
        if self.is_initialized:
            for name in ("keys", "values"):
                old: Tensor = getattr(self, name)
                new = old.new_zeros(num_slots, old.shape[1], num_columns, old.shape[3])
                kept = slice(min(num_slots, old.shape[0]))
                new[kept, :, :num_used] = old[kept, :, :num_used]
                setattr(self, name, new)

    def narrow(self, num_slots: int, num_columns: int) -> None:
        """Use only the first slots and columns. The memory of the other slots and columns stays allocated."""
        if self.is_initialized:
            self.keys = self.keys[:num_slots, :, :num_columns]
            self.values = self.values[:num_slots, :, :num_columns]

    def move(self, source: int, target: int, num_columns: int) -> None:
        """Copy the first `num_columns` columns of the slot `source` into the slot `target`."""
        for stored in (self.keys, self.values):
            stored[target, :, :num_columns] = stored[source, :, :num_columns]

    def wipe(self, slots: slice, columns: slice) -> None:
        """Fill these columns of these slots with zeros."""
        if self.is_initialized:
            self.keys[slots, :, columns] = 0
            self.values[slots, :, columns] = 0

    @property
    def num_bytes(self) -> int:
        """The size of the keys and values in bytes."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns that the forward pass attends to, and the index of the first one, which is 0."""
        return self._slots.placement.width, 0

    def get_seq_length(self) -> int:
        """Return 0, because the rows differ in length. The model gets its positions from `KvSlots.place`."""
        return 0

    def get_max_length(self) -> int:
        """Return -1, which means that the layer has no maximum length."""
        return -1


class KvSlots:
    """The KV cache of a running batch. Its memory grows as needed and is written in place.

    Columns that a row has not written contain zeros. Attention multiplies the values of masked columns by 0, but 0
    times NaN or infinity is NaN. So a slot is filled with zeros before another row uses it.

    Attributes:
        cache: the transformers cache with which the model is called.
        kinds: the kinds of attention that the model's layers use.
        num_slots: number of allocated slots.
        num_columns: number of allocated columns of each slot.
        placement: the slots and columns into which the next forward pass writes.

    Args:
        config: the model's configuration.
        max_bytes: maximum size of the allocated memory in bytes; None for no limit. The limit is exceeded if the rows
            need more. While the memory is resized, the old memory of one layer is allocated in addition.

    Raises:
        UsageError: if a layer, such as a recurrent layer, does not keep the keys and values of every token, or if the
            attention does not respect the mask of each row.
    """

    def __init__(self, config: Any, max_bytes: int | None = None) -> None:
        text = config.get_text_config(decoder=True)
        check_attention(text)
        self.kinds = layer_kinds(text)
        self.num_slots = 0
        self.num_columns = 0
        self.placement = Placement(0, torch.zeros(0, 0, dtype=torch.int64), 0)
        self._max_bytes = max_bytes
        self._written: list[int] = []  # for each slot, the number of columns that have been written
        self._window = int(getattr(text, "sliding_window", None) or 0)
        self._is_eager = text._attn_implementation == "eager"
        self._layers = [_SlotLayer(self) for _ in range(text.num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))

    @property
    def num_bytes(self) -> int:
        """The size of the allocated memory of all layers in bytes."""
        return sum(layer.num_bytes for layer in self._layers)

    def fits(self, num_slots: int, num_tokens: int, token_bytes: int) -> bool:
        """Return whether the memory for `num_slots` rows with `num_tokens` tokens each stays within the limit.

        Args:
            num_slots: number of rows.
            num_tokens: number of tokens of each row.
            token_bytes: size of the keys and values of one token in all layers, in bytes.
        """
        num_entries = _rounded_slots(num_slots) * _rounded_columns(num_tokens)
        return self._max_bytes is None or num_entries * token_bytes <= self._max_bytes

    def fit(self, num_slots: int, num_tokens: int) -> None:
        """Allocate memory for the rows of the batch. If the limit requires it, free the memory that they do not need.

        Args:
            num_slots: number of rows, including the rows that are read next.
            num_tokens: number of tokens of the longest row, including the tokens that it may still get.
        """
        slots = max(self.num_slots, _rounded_slots(num_slots))
        columns = max(self.num_columns, _rounded_columns(num_tokens))
        allocated = self.num_slots * self.num_columns
        if self._max_bytes is not None and allocated and slots * columns * self.num_bytes > self._max_bytes * allocated:
            # rows that have left the batch needed more slots or columns; shrink to what the present rows need
            slots, columns = _rounded_slots(num_slots), _rounded_columns(num_tokens)
        self._resize(slots, columns)

    def _grow(self, num_slots: int, num_tokens: int) -> None:
        """Allocate memory for the rows, even if it exceeds the limit."""
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
            # The device's memory is full. All layers use the size of the smallest layer, which has room for every row.
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
        """Copy the first `num_tokens` tokens of the slot `source` into `target`, and clear the rest of `target`."""
        stale = slice(num_tokens, self._written[target])
        for layer in self._layers:
            layer.move(source, target, num_tokens)
            if stale.stop > stale.start:
                layer.wipe(slice(target, target + 1), stale)
        self._written[target] = num_tokens

    def _wipe(self, slots: slice) -> None:
        """Set to zero the columns that earlier rows have written in these slots."""
        stale = max(self._written[slots], default=0)
        if stale:
            for layer in self._layers:
                layer.wipe(slots, slice(stale))

    def place(self, first: int, starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Set the placement of the next forward pass, and return the model's keyword arguments for this pass.

        Args:
            first: the slot of the first row. The other rows use the slots that follow.
            starts: for each row, the number of tokens that its slot already contains.
            lengths: for each row, the number of tokens that the forward pass adds. In `input_ids`, `[N, Q]`, shorter
                rows are padded on the left.
            device: the model's device.

        Returns:
            A dict with `past_key_values`, `position_ids`, `[N, Q]`, and `attention_mask`, `[N, 1, Q, W]`. If the model
            has several kinds of attention, `attention_mask` is a dict with one mask for each kind.
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
        # padding attends to the first column, because a softmax over no columns would be NaN
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
        """Return a mask in the form that the model's attention expects.

        Eager attention expects numbers to add to the scores, and SDPA expects booleans.
        """
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e30) if self._is_eager else mask


def _zeros(numbers: Sequence[int]) -> list[int]:
    return [place for place, number in enumerate(numbers) if number == 0]


def _rounded_slots(count: int) -> int:
    return 1 << (count - 1).bit_length() if count <= _SLOTS else -(-count // _SLOTS) * _SLOTS


def _rounded_columns(num_tokens: int) -> int:
    # one more column than tokens, because the last column is for padding
    return -(-(num_tokens + 1) // _COLUMNS) * _COLUMNS
