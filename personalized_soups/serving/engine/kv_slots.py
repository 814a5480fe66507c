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
# Those that heed a mask of every row's own; flash attention takes none.
_KNOWN_ATTENTION = {"sdpa", "eager"}


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

    def __init__(self, slots: KvSlots) -> None:
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
        """Take the first columns of the first slots along into other room."""
        if self.is_initialized:
            for name in ("keys", "values"):
                old: Tensor = getattr(self, name)
                new = old.new_zeros(num_slots, old.shape[1], num_columns, old.shape[3])
                kept = slice(min(num_slots, old.shape[0]))
                new[kept, :, :num_used] = old[kept, :, :num_used]
                setattr(self, name, new)

    def narrow(self, num_slots: int, num_columns: int) -> None:
        """Be no larger than so: room that others did not get is left aside."""
        if self.is_initialized:
            self.keys = self.keys[:num_slots, :, :num_columns]
            self.values = self.values[:num_slots, :, :num_columns]

    def move(self, source: int, target: int, num_columns: int) -> None:
        """Put a slot's first columns into another one."""
        for held in (self.keys, self.values):
            held[target, :, :num_columns] = held[source, :, :num_columns]

    def wipe(self, slots: slice, columns: slice) -> None:
        """Make it zeros again."""
        if self.is_initialized:
            self.keys[slots, :, columns] = 0
            self.values[slots, :, columns] = 0

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


class KvSlots:
    """The keys and values of a batch: room that grows, written in place; `cache` is what a model is given.

    Columns that a row has not written hold zeros: what is masked is multiplied by 0, which NaN and infinities of a row
    that has left would survive. So a slot is wiped when it is taken anew.

    Args:
        config: of the model, which says how many layers there are and of which kind.
        most_bytes: that are held, once what is needed fits; None is without limit. While room is made anew, one layer's
            old room comes on top.

    Raises:
        UsageError: if a layer keeps no keys and values for each token (a recurrent one), or heeds no mask.
    """

    def __init__(self, config: Any, most_bytes: int | None = None) -> None:
        text = config.get_text_config(decoder=True)
        _check_attention(text)
        self.kinds = layer_kinds(text)
        self.num_slots = 0
        self.num_columns = 0
        self.placement = Placement(0, torch.zeros(0, 0, dtype=torch.int64), 0)
        self._most_bytes = most_bytes
        self._written: list[int] = []  # of each slot, the columns in which anything stands
        self._window = int(getattr(text, "sliding_window", None) or 0)
        self._is_eager = text._attn_implementation == "eager"
        self._layers = [_SlotLayer(self) for _ in range(text.num_hidden_layers)]
        self.cache = Cache(layers=list(self._layers))

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values that there is room for."""
        return sum(layer.num_bytes for layer in self._layers)

    def fits(self, num_slots: int, num_tokens: int, token_bytes: int) -> bool:
        """Return whether room for so many rows of so many tokens is within the limit.

        Args:
            num_slots: rows.
            num_tokens: of each.
            token_bytes: of the keys and values of one token.
        """
        room = _rounded_slots(num_slots) * _rounded_columns(num_tokens)
        return self._most_bytes is None or room * token_bytes <= self._most_bytes

    def fit(self, num_slots: int, num_tokens: int) -> None:
        """Make room for so many rows of so many tokens, and no more where the limit asks for it. What they hold stays.

        Args:
            num_slots: all that are taken, and those that will be.
            num_tokens: that the longest of them has and will have.
        """
        slots = max(self.num_slots, _rounded_slots(num_slots))
        columns = max(self.num_columns, _rounded_columns(num_tokens))
        held = self.num_slots * self.num_columns
        if self._most_bytes is not None and held and slots * columns * self.num_bytes > self._most_bytes * held:
            # rows that have left needed more
            slots, columns = _rounded_slots(num_slots), _rounded_columns(num_tokens)
        self._resize(slots, columns)

    def _grow(self, num_slots: int, num_tokens: int) -> None:
        """Make room for so many rows of so many tokens, whatever there is for others."""
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
            # the device's memory is full: all layers are as large as the smallest one, and what rows hold is in that
            num_slots, num_columns = min(num_slots, self.num_slots), min(num_columns, self.num_columns)
            raise
        finally:
            for layer in self._layers:
                layer.narrow(num_slots, num_columns)
            self.num_slots, self.num_columns = num_slots, num_columns
            self._written = written[:num_slots] + [0] * (num_slots - len(written))

    def clear(self) -> None:
        """Let go of all room."""
        self.num_slots = self.num_columns = 0
        self._written = []
        for layer in self._layers:
            layer.is_initialized = False
            layer.keys = layer.values = torch.zeros(0)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Put a slot's tokens into another slot."""
        stale = slice(num_tokens, self._written[target])
        for layer in self._layers:
            layer.move(source, target, num_tokens)
            if stale.stop > stale.start:
                layer.wipe(slice(target, target + 1), stale)
        self._written[target] = num_tokens

    def _wipe(self, slots: slice) -> None:
        """Wipe what rows that have left wrote into slots."""
        stale = max(self._written[slots], default=0)
        if stale:
            for layer in self._layers:
                layer.wipe(slots, slice(stale))

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
        self._grow(first + len(starts), width)
        rows = slice(first, first + len(starts))
        for fresh in [rows] if not any(starts) else [slice(first + row, first + row + 1) for row in _zeros(starts)]:
            self._wipe(fresh)
        self._written[rows] = [start + length for start, length in zip(starts, lengths, strict=True)]
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
            mend="take a model of full or sliding attention, or answer in batches: psoups generate",
        )
    return tuple(sorted(set(listed)))


def _check_attention(text: Any) -> None:
    kind = text._attn_implementation
    if kind not in _KNOWN_ATTENTION:
        raise UsageError(
            f"the model's attention is {kind}, which heeds no mask of every row's own",
            where="base",
            mend="load it with attn_implementation='sdpa'",
        )
    # GPT-Neo counts its local layers' windows by the column, not by the row
    if "local" in (getattr(text, "attention_layers", None) or ()):
        raise UsageError(
            "the model has layers of local attention, whose rows can't join and leave a batch here",
            where="base",
            mend="answer in batches: psoups generate",
        )


def _zeros(numbers: Sequence[int]) -> list[int]:
    return [place for place, number in enumerate(numbers) if number == 0]


def _rounded_slots(count: int) -> int:
    return 1 << (count - 1).bit_length() if count <= _SLOTS else -(-count // _SLOTS) * _SLOTS


def _rounded_columns(num_tokens: int) -> int:
    # one more than tokens: the last column is for padding
    return -(-(num_tokens + 1) // _COLUMNS) * _COLUMNS
