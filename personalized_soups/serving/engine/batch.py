"""The rows that are being answered: each with its own soup, joining and leaving between two steps of the others.

N rows, Q tokens of a forward pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.mixing.mixture import Row
from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.engine.kv_slots import KvSlots
from personalized_soups.serving.engine.token_sampler import Choice, TokenSampler, choose


@dataclass(eq=False, slots=True)
class BatchRow:
    """One answer that is being made.

    Args:
        tokens: the prompt's; the answer's are added.
        weights: whose soup it is.
        chooser: of its tokens.
    """

    tokens: list[int]
    weights: Row
    chooser: TokenSampler
    num_read: int = field(default=0, init=False)  # tokens whose keys and values its slot has
    slot: int = field(default=-1, init=False)


class Batch:
    """Rows in slots, the first ones of which are decoded together.

    All calls come from one thread, which holds the model's mixture from one change of the rows to the next: `release`
    lets others have the model.

    Args:
        model: base and experts.
        cache_bytes: that keys and values may take, once rows fit into that; None is without limit.

    Raises:
        UsageError: if the model's rows cannot be kept in slots, which is tried.
    """

    def __init__(self, model: SoupModel, cache_bytes: int | None = None) -> None:
        self._model = model
        self._slots = KvSlots(model.model.config, cache_bytes)
        self._rows: list[BatchRow] = []
        self._mixture = ExitStack()
        self._is_set = False
        self._keeps_last = bool(model.model._supports_logits_to_keep())
        self.token_bytes = self._tried()  # of keys and values

    @property
    def rows(self) -> Sequence[BatchRow]:
        """The rows that are decoded, by slot."""
        return self._rows

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values."""
        return self._slots.num_bytes

    def fits(self, num_rows: int, num_tokens: int) -> bool:
        """Return whether there is memory for so many rows of so many tokens."""
        return self._slots.fits(num_rows, num_tokens, self.token_bytes)

    def read(self, rows: Sequence[BatchRow], most: int, *, num_tokens: int = 0) -> list[Choice] | None:
        """Read the next tokens of rows whose prompts are not read yet, at most `most` of each.

        Args:
            rows: none of which has joined; they stand behind those that have. Several rows are read whole.
            most: tokens.
            num_tokens: make room for so many of each row at once, those of the answers among them, and of the rows
                that have joined.

        Returns:
            The first token of each answer, once the prompts are read; the rows have joined then. None before.
        """
        self.release()
        chunks = [row.tokens[row.num_read : row.num_read + most] for row in rows]
        first = len(self._rows)
        self._slots.fit(first + len(rows), max(num_tokens, *(len(row.tokens) + 1 for row in (*self._rows, *rows))))
        for slot, row in enumerate(rows, first):
            if row.num_read and row.slot != slot:  # others have left since its last part was read
                self._slots.move(row.slot, slot, row.num_read)
            row.slot = slot
        with self._model.mixture([row.weights for row in rows]):
            logits_NV = self._forward(first, chunks, [row.num_read for row in rows])
        if any(row.num_read + len(chunk) < len(row.tokens) for row, chunk in zip(rows, chunks, strict=True)):
            choices = None
        else:
            choices = self._chosen(logits_NV, rows)
        for row, chunk in zip(rows, chunks, strict=True):
            row.num_read += len(chunk)
        if choices is not None:
            self._rows.extend(rows)
        return choices

    def step(self) -> list[Choice]:
        """Return the next token of every row, by slot."""
        rows = self._rows
        if not self._is_set:
            self._mixture.enter_context(self._model.mixture([row.weights for row in rows]))
            self._is_set = True
        logits_NV = self._forward(0, [row.tokens[-1:] for row in rows], [row.num_read for row in rows])
        choices = self._chosen(logits_NV, rows)
        for row in rows:
            row.num_read += 1
        return choices

    def remove(self, gone: Sequence[BatchRow]) -> None:
        """Let rows go; the last ones take their slots."""
        if not gone:
            return
        self.release()
        leaving = set(map(id, gone))
        for slot in sorted((slot for slot, row in enumerate(self._rows) if id(row) in leaving), reverse=True):
            last = self._rows.pop()
            if slot < len(self._rows):
                self._slots.move(last.slot, slot, last.num_read)
                last.slot = slot
                self._rows[slot] = last

    def release(self) -> None:
        """Leave the mixture: other threads may set theirs, and experts may change."""
        self._is_set = False
        self._mixture.close()

    def clear(self) -> None:
        """Let all rows and their memory go."""
        self.release()
        self._rows.clear()
        self._slots.clear()

    def _tried(self) -> int:
        """Let two rows of different lengths be read and go on, see that each is as it is alone, and clear all.

        Returns:
            How many bytes each token took.

        Raises:
            UsageError: if it isn't: the model takes no positions, or no mask of every row's own.
        """
        model: Any = self._model.model
        try:
            with self._model.mixture(None), torch.inference_mode():
                is_own = self._is_own([[1, 2, 3], [4, 5, 6, 7, 8, 9]])
            token_bytes = self._slots.num_bytes // (self._slots.num_slots * self._slots.num_columns)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as fault:
            raise _unfit(model) from fault
        finally:
            self.clear()
        if not is_own:
            raise _unfit(model)
        return token_bytes

    def _is_own(self, tokens: Sequence[Sequence[int]]) -> bool:
        model: Any = self._model.model
        self._forward(0, [row[:-1] for row in tokens], [0] * len(tokens))
        got_NV = self._forward(0, [row[-1:] for row in tokens], [len(row) - 1 for row in tokens]).double()
        for row, got_V in zip(tokens, got_NV, strict=True):
            ids_1T = torch.tensor([row], device=model.device)
            want_V: Tensor = model(input_ids=ids_1T, use_cache=False).logits[0, -1].double()
            # rounding, even of eight bits, is far below; another context is far above
            if not (got_V - want_V).norm() <= 0.3 * (want_V - want_V.mean()).norm():
                return False
        return True

    def _forward(self, first: int, chunks: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Return the logits after each row's last token, `[N, V]`."""
        most = max(map(len, chunks))
        ids_NQ = torch.tensor([[0] * (most - len(chunk)) + list(chunk) for chunk in chunks])
        model: Any = self._model.model
        told = self._slots.place(first, starts, list(map(len, chunks)), model.device)
        keep = {"logits_to_keep": 1} if self._keeps_last else {}
        logits_NQV: Tensor = model(input_ids=ids_NQ.to(model.device), use_cache=True, **told, **keep).logits
        return logits_NQV[:, -1]

    def _chosen(self, logits_NV: Tensor, rows: Sequence[BatchRow]) -> list[Choice]:
        found = choose(logits_NV, [row.chooser for row in rows])
        for row, choice in zip(rows, found, strict=True):
            row.tokens.append(choice.token)
        return found


def _unfit(model: Any) -> UsageError:
    return UsageError(
        f"rows of several lengths in one batch of a {type(model).__name__} come out as other ones",
        where="base",
        mend="take a model of full or sliding attention, or answer in batches: psoups generate",
    )
