"""The running batch. Each row has its own soup (weighted sum of the experts), and joins and leaves between two steps.

Shapes: N = rows, Q = columns of a forward pass, T = tokens of a row, V = vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.engine.attention import rows_differ
from personalized_soups.serving.engine.kv_slots import KvSlots
from personalized_soups.serving.engine.token_sampler import Choice, TokenSampler, choose


@dataclass(eq=False, slots=True)
class BatchRow:
    """A prompt with the part of its answer that has been generated so far.

    Attributes:
        tokens: the tokens of the prompt. The batch appends the tokens of the answer.
        weights: the checked weights of the row's soup.
        sampler: chooses the row's tokens.
        num_read: number of tokens whose keys and values are in the row's slot of the KV cache.
        slot: the index of this slot; -1 before any token is read.
    """

    tokens: list[int]
    weights: ExpertWeights
    sampler: TokenSampler
    num_read: int = field(default=0, init=False)
    slot: int = field(default=-1, init=False)


class Batch:
    """Rows that are decoded together, one token of each row at a time.

    A row joins the batch when its whole prompt has been read. The keys and values of each row are in a slot of the KV
    cache. The rows that have joined use the first slots.

    All calls must come from one thread. `step` sets the model's mixture to the soups of the rows, and keeps it for the
    next step. Other threads must not use the model until `release` is called.

    Attributes:
        token_bytes: size of the keys and values of one token in all layers, in bytes.

    Args:
        model: the base with its experts.
        cache_bytes: maximum size of the keys and values in bytes; None for no limit.

    Raises:
        UsageError: if the model does not support continuous batching. The constructor tests this with two short rows.
    """

    def __init__(self, model: SoupModel, cache_bytes: int | None = None) -> None:
        self._model = model
        self._slots = KvSlots(model.model.config, cache_bytes)
        self._rows: list[BatchRow] = []
        self._mixture = ExitStack()
        self._is_set = False
        self._keeps_last = bool(model.model._supports_logits_to_keep())
        self.token_bytes = self._measure()

    @property
    def rows(self) -> Sequence[BatchRow]:
        """The rows that have joined, in the order of their slots."""
        return self._rows

    @property
    def num_bytes(self) -> int:
        """The size of the memory allocated for keys and values, in bytes."""
        return self._slots.num_bytes

    def fits(self, num_rows: int, num_tokens: int) -> bool:
        """Return whether the cache of `num_rows` rows with `num_tokens` tokens each stays within `cache_bytes`."""
        return self._slots.fits(num_rows, num_tokens, self.token_bytes)

    def read(self, rows: Sequence[BatchRow], max_tokens: int, *, num_tokens: int = 0) -> list[Choice] | None:
        """Read at most `max_tokens` further tokens of each prompt.

        When the prompts have been read completely, the rows join the batch.

        Args:
            rows: rows that have not joined. Several rows must be read completely in this call. The prompt of a single
                row may be read in several calls.
            max_tokens: maximum number of tokens to read of each prompt.
            num_tokens: number of tokens of the longest row of the batch, including the tokens that its answer may still
                get. Memory for them is allocated now, so that it need not grow later.

        Returns:
            The first token of each answer, or None if a prompt has not been read completely.
        """
        self.release()
        chunks = [row.tokens[row.num_read : row.num_read + max_tokens] for row in rows]
        first = len(self._rows)
        self._slots.fit(first + len(rows), max(num_tokens, *(len(row.tokens) + 1 for row in (*self._rows, *rows))))
        for slot, row in enumerate(rows, first):
            if row.num_read and row.slot != slot:
                # rows have left the batch since the last part of this prompt was read
                self._slots.move(row.slot, slot, row.num_read)
            row.slot = slot
        with self._model.mixture([row.weights for row in rows]):
            logits_NV = self._forward(first, chunks, [row.num_read for row in rows])
        if any(row.num_read + len(chunk) < len(row.tokens) for row, chunk in zip(rows, chunks, strict=True)):
            choices = None
        else:
            choices = _append_choices(logits_NV, rows)
        for row, chunk in zip(rows, chunks, strict=True):
            row.num_read += len(chunk)
        if choices is not None:
            self._rows.extend(rows)
        return choices

    def step(self) -> list[Choice]:
        """Append the next token to every row that has joined, and return the choices in the order of the slots."""
        rows = self._rows
        if not self._is_set:
            self._mixture.enter_context(self._model.mixture([row.weights for row in rows]))
            self._is_set = True
        logits_NV = self._forward(0, [row.tokens[-1:] for row in rows], [row.num_read for row in rows])
        choices = _append_choices(logits_NV, rows)
        for row in rows:
            row.num_read += 1
        return choices

    def remove(self, rows: Sequence[BatchRow]) -> None:
        """Remove rows from the batch. Rows from the last slots move into the slots that become free."""
        if not rows:
            return
        self.release()
        removed = set(map(id, rows))
        for slot in sorted((slot for slot, row in enumerate(self._rows) if id(row) in removed), reverse=True):
            last = self._rows.pop()
            if slot < len(self._rows):
                self._slots.move(last.slot, slot, last.num_read)
                last.slot = slot
                self._rows[slot] = last

    def release(self) -> None:
        """End the model's mixture, so that other threads can use the model and experts can be changed."""
        self._is_set = False
        self._mixture.close()

    def clear(self) -> None:
        """Remove all rows and free their memory."""
        self.release()
        self._rows.clear()
        self._slots.clear()

    def _measure(self) -> int:
        """Return the size of one token's keys and values in bytes.

        The size is measured on two short rows, which are removed afterward.

        Raises:
            UsageError: if the model does not accept positions and a mask for each row, or if the logits of one row
                depend on the other row.
        """
        model: Any = self._model.model
        try:
            with self._model.mixture(None), torch.inference_mode():
                is_independent = self._has_independent_rows([[1, 2, 3], [4, 5, 6, 7, 8, 9]])
            token_bytes = self._slots.num_bytes // (self._slots.num_slots * self._slots.num_columns)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise rows_differ(model) from error
        finally:
            self.clear()
        if not is_independent:
            raise rows_differ(model)
        return token_bytes

    def _has_independent_rows(self, tokens: Sequence[Sequence[int]]) -> bool:
        """Return whether the last token of each row has the same logits in a batch as in a batch of its own."""
        model: Any = self._model.model
        self._forward(0, [row[:-1] for row in tokens], [0] * len(tokens))
        got_NV = self._forward(0, [row[-1:] for row in tokens], [len(row) - 1 for row in tokens]).double()
        for row, got_V in zip(tokens, got_NV, strict=True):
            ids_1T = torch.tensor([row], device=model.device)
            want_V: Tensor = model(input_ids=ids_1T, use_cache=False).logits[0, -1].double()
            # a relative difference from rounding, even to eight bits, is far below 0.3; from another context, far above
            if not (got_V - want_V).norm() <= 0.3 * (want_V - want_V.mean()).norm():
                return False
        return True

    def _forward(self, first: int, chunks: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Run the model on `chunks[n]` for each row n, and return the logits after the row's last token, `[N, V]`.

        Row n is in slot `first + n`, which already has the keys and values of `starts[n]` tokens.
        """
        num_columns = max(map(len, chunks))
        # padding is on the left, so that every row's last token is in the last column
        ids_NQ = torch.tensor([[0] * (num_columns - len(chunk)) + list(chunk) for chunk in chunks])
        model: Any = self._model.model
        inputs = self._slots.place(first, starts, list(map(len, chunks)), model.device)
        keep = {"logits_to_keep": 1} if self._keeps_last else {}
        logits_NQV: Tensor = model(input_ids=ids_NQ.to(model.device), use_cache=True, **inputs, **keep).logits
        return logits_NQV[:, -1]


def _append_choices(logits_NV: Tensor, rows: Sequence[BatchRow]) -> list[Choice]:
    choices = choose(logits_NV, [row.sampler for row in rows])
    for row, choice in zip(rows, choices, strict=True):
        row.tokens.append(choice.token)
    return choices
