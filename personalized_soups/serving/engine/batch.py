"""The rows of a running batch: each row has its own soup, and joins and leaves between two steps of the others.

N rows, Q tokens of a forward pass, V vocabulary.
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
    """A prompt with the answer generated so far.

    Attributes:
        tokens: the tokens of the prompt; the batch appends those of the answer.
        weights: the checked weights of the row's soup.
        sampler: chooses the row's tokens.
        num_read: tokens whose keys and values are in the row's slot.
        slot: the number of the row's slot; -1 before the row is read.
    """

    tokens: list[int]
    weights: ExpertWeights
    sampler: TokenSampler
    num_read: int = field(default=0, init=False)
    slot: int = field(default=-1, init=False)


class Batch:
    """Rows in slots; the rows that have joined fill the first slots and are decoded together.

    All calls must come from one thread. The batch holds the model's mixture between two changes of its rows; `release`
    lets other threads use the model.

    Attributes:
        token_bytes: bytes of the keys and values of one token, in all layers.

    Args:
        model: base and experts.
        cache_bytes: limit for the bytes of keys and values; None for no limit.

    Raises:
        UsageError: if rows of the model cannot join and leave a batch. The constructor tests this with two short rows.
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
        """The rows that have joined, by slot."""
        return self._rows

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self._slots.num_bytes

    def fits(self, num_rows: int, num_tokens: int) -> bool:
        """Return whether the keys and values of `num_rows` rows of `num_tokens` tokens stay within the limit."""
        return self._slots.fits(num_rows, num_tokens, self.token_bytes)

    def read(self, rows: Sequence[BatchRow], max_tokens: int, *, num_tokens: int = 0) -> list[Choice] | None:
        """Read the next tokens of prompts, at most `max_tokens` of each.

        Args:
            rows: rows that have not joined. Several rows must be read in one call; a single one may take several calls.
            max_tokens: tokens to read.
            num_tokens: columns to allocate: tokens of the longest row, including those that its answer will get. The
                memory then need not grow while the answers do.

        Returns:
            The first token of each answer once the prompts are read; the rows have joined then. None before.
        """
        self.release()
        chunks = [row.tokens[row.num_read : row.num_read + max_tokens] for row in rows]
        first = len(self._rows)
        self._slots.fit(first + len(rows), max(num_tokens, *(len(row.tokens) + 1 for row in (*self._rows, *rows))))
        for slot, row in enumerate(rows, first):
            if row.num_read and row.slot != slot:  # other rows have left since the last part was read
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
        """Append the next token to every row that has joined, and return the choices by slot."""
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
        """Remove rows; the last rows of the batch move into their slots."""
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
        """Leave the model's mixture: other threads may set theirs, and experts may change."""
        self._is_set = False
        self._mixture.close()

    def clear(self) -> None:
        """Remove all rows and free their memory."""
        self.release()
        self._rows.clear()
        self._slots.clear()

    def _measure(self) -> int:
        """Return the bytes of one token's keys and values, measured on two rows that are removed afterwards.

        Raises:
            UsageError: if the model rejects positions or a mask for each row, or if a row's logits depend on the other
                row.
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
        """Return whether the last token's logits of rows in one batch are those of each row alone."""
        model: Any = self._model.model
        self._forward(0, [row[:-1] for row in tokens], [0] * len(tokens))
        got_NV = self._forward(0, [row[-1:] for row in tokens], [len(row) - 1 for row in tokens]).double()
        for row, got_V in zip(tokens, got_NV, strict=True):
            ids_1T = torch.tensor([row], device=model.device)
            want_V: Tensor = model(input_ids=ids_1T, use_cache=False).logits[0, -1].double()
            # rounding, even to eight bits, changes far less than 0.3; another row's context changes far more
            if not (got_V - want_V).norm() <= 0.3 * (want_V - want_V.mean()).norm():
                return False
        return True

    def _forward(self, first: int, chunks: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Return the logits after each row's last token, `[N, V]`."""
        num_columns = max(map(len, chunks))
        # padded on the left, so that every row's last token is in the last column
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
