"""The mixture that is set: the weights of a batch's rows, and when they are written into the gates.

The gates are the buffers from which the layers read the weights.

Shapes: B = rows of the batch, T = tokens of a row.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.errors import UsageError
from personalized_soups.mixing.layers.gates import Gates
from personalized_soups.mixing.layers.mixed_layers import MixedLayers
from personalized_soups.mixing.layers.weight_table import weight_table


class Mixture:
    """The weights of one batch. `step` changes the weights that follow a schedule.

    Attributes:
        rows: the weights of each gate.
        is_scheduled: whether a weight is a function of the generated token's number.
        task: the asyncio task that made the mixture; None if no task was running.
        is_innermost: a function that returns True if the gates hold this mixture, False if they hold a mixture that was
            set within it, and None if this mixture has ended.

    Args:
        rows: the weights of each gate. A gate is for one or several rows of the batch, for one token, or for all rows.
        gates: the gates of the model.
        layers: the names of the layers, in the order of their slots.
        token_rows: for packed sequences, an integer tensor `[B, T]`: the index in `rows` for each token.
        rows_each: the number of rows of the batch for each entry of `rows`; None if the only entry is for all rows.

    Raises:
        UsageError: if `rows` is empty, `rows_each` is less than 1, an index in `token_rows` is out of range, or a
            weight does not fit into the model's dtype.
        DeclarationError: if a weight's pattern matches no layer, or a schedule returns something other than a weight.
    """

    def __init__(
        self,
        rows: Sequence[ExpertWeights],
        gates: Gates,
        layers: Sequence[str],
        *,
        token_rows: Tensor | None = None,
        rows_each: int | None = 1,
    ) -> None:
        if not rows:
            raise UsageError("there are no profiles", where="profiles", mend="give one profile for each prompt")
        if rows_each is not None and rows_each < 1:
            raise UsageError(
                f"rows_each is {rows_each}, but must be at least 1",
                where="rows_each",
                mend="give the number of rows of each profile, such as rows_each=4",
            )
        self.rows = tuple(rows)
        self.is_scheduled = any(row.is_scheduled for row in rows)
        self._gates = gates
        self._layers = layers
        self._rows_each = rows_each
        self._token_rows = None if token_rows is None else _checked_tokens(token_rows, len(rows))
        self._step = 0
        # The tables are made here, so that a wrong weight raises before the mixture is set.
        self._tables = self._tables_at(0)
        self.task = _task()
        self.is_innermost: Callable[[], bool | None] = lambda: True

    def step(self, number: int) -> None:
        """From the next forward pass on, use the weights that the schedules return for the generated token `number`.

        Keys and values that are cached already do not change.

        Raises:
            DeclarationError: if a schedule returns something other than a weight. The weights stay as they were.
            UsageError: if a weight does not fit into the model's dtype, or the mixture has ended.
        """
        is_innermost = self.is_innermost()
        if is_innermost is None:
            raise UsageError(
                "`step` was called, but the mixture has ended",
                where="mixture",
                mend="call `step` within the `with model.mixture(...)` block",
            )
        # Without schedules, the tables are the same at every step.
        if self.is_scheduled and number != self._step:
            # The new tables are made first: if a schedule raises, nothing has changed.
            self._tables = self._tables_at(number)
            self._step = number
            # Otherwise the gates hold an inner mixture. When it ends, `settle` applies this mixture.
            if is_innermost:
                self.apply()

    def apply(self) -> None:
        """Write the weights into the gates."""
        gates = self._gates
        gates.set(*self._tables)
        gates.rows_each = self._rows_each
        gates.token_rows = self._token_rows
        # `is_on` is set last, because layers read the gates as soon as it is true.
        gates.is_on = True

    def start(self) -> list[NextStep]:
        """Set the schedules to step 0 for a new answer, and return the logits processors that advance them.

        So every prompt is computed with the weights of step 0, also after an earlier answer within this mixture.
        Without schedules, the list is empty.
        """
        if not self.is_scheduled:
            return []
        self.step(0)
        return [NextStep(self)]

    def _tables_at(self, step: int) -> tuple[Tensor, Tensor | None]:
        tables = weight_table([row.at(step) for row in self.rows], self._gates.layout.experts, self._layers)
        self._gates.layout.check(*tables)
        return tables


class ActiveMixture:
    """Decides which weights the gates hold: those of the innermost mixture, or the idle weights if no mixture is set.

    One thread at a time can set mixtures. Other threads wait until its outermost mixture has ended.

    Attributes:
        lock: held while a mixture is set.
        idle_weights: a function that returns the weights of every row while no mixture is set. Empty weights stand for
            the bare base.

    Args:
        layers: the wrapped layers of the model.
    """

    def __init__(self, layers: MixedLayers) -> None:
        # Reentrant: a thread may set a mixture within its own mixture.
        self.lock = threading.RLock()
        self.idle_weights: Callable[[], ExpertWeights] = ExpertWeights
        self._layers = layers
        self._set: list[Mixture] = []  # outermost first
        self._setter: int | None = None  # the id of the thread that has set them
        layers.watch.when_moved = self.settle

    @property
    def innermost(self) -> Mixture | None:
        """The mixture that the gates hold; None if no mixture is set."""
        return self._set[-1] if self._set else None

    @property
    def is_set_here(self) -> bool:
        """Whether this thread has set a mixture."""
        return self._setter == threading.get_ident()

    @contextmanager
    def mixture(
        self, rows: Callable[[], Sequence[ExpertWeights]], *, token_rows: Tensor | None, rows_each: int | None
    ) -> Iterator[Mixture]:
        """Set a mixture within the block.

        Args:
            rows: a function that returns the weights of each gate. It is called after other threads have left their
                mixtures.
            token_rows: as for `Mixture`.
            rows_each: as for `Mixture`.

        Raises:
            DeclarationError: in the same cases as `Mixture`.
            UsageError: in the same cases as `Mixture`, and if another asyncio task of this thread has set a mixture.
        """
        with self.lock:
            self._check_task()
            # `follow` comes before the rows are made, because moved layers may have new slots and a new dtype.
            self._layers.follow()
            mixture = self.new_mixture(rows(), token_rows=token_rows, rows_each=rows_each)
            mixture.is_innermost = lambda: None if mixture not in self._set else self._set[-1] is mixture
            self._set.append(mixture)
            self._setter = threading.get_ident()
            try:
                mixture.apply()
                yield mixture
            finally:
                # `pop` would be wrong: contexts that are entered by hand may be left in any order.
                self._set.remove(mixture)
                if not self._set:
                    self._setter = None
                self.settle()

    @contextmanager
    def as_set(self) -> Iterator[Mixture | None]:
        """Keep the weights as they are within the block: other threads cannot set a mixture.

        Yields:
            This thread's innermost mixture; None if this thread has set no mixture, so that the idle weights are used.
        """
        with self.lock:
            self._check_task()
            yield self.innermost

    def check(self, weights: ExpertWeights) -> None:
        """Raise the error that a mixture of these weights would raise. Nothing is set, and no lock is taken.

        Raises:
            UsageError, DeclarationError: in the same cases as `Mixture`.
        """
        plain = {expert: weight for expert, weight in weights.weights.items() if isinstance(weight, float)}
        # Most requests have plain numbers as weights, which can be checked without tables.
        if len(plain) < len(weights.weights) or not self._layers.gates.layout.holds(plain):
            self.new_mixture([weights])

    def settle(self) -> None:
        """Write the current weights into the gates: those of the innermost mixture, or else the idle weights."""
        # Experts, dtype or device may have changed since the last write.
        self._layers.follow()
        if self._set:
            self._set[-1].apply()
            return
        weights = self.idle_weights()
        self._layers.gates.is_on = False  # the gates stay off if the weights do not fit and `new_mixture` raises
        if weights.weights:
            self.new_mixture([weights]).apply()

    def new_mixture(
        self, rows: Sequence[ExpertWeights], *, token_rows: Tensor | None = None, rows_each: int | None = None
    ) -> Mixture:
        """Return a mixture of these rows, but do not set it. Raises the errors of `Mixture`."""
        names = list(self._layers.by_name)
        return Mixture(rows, self._layers.gates, names, token_rows=token_rows, rows_each=rows_each)

    def _check_task(self) -> None:
        # A mixture that was set outside of any task is also used by the tasks within its block.
        if self._set and self._set[-1].task is not None and self._set[-1].task is not _task():
            raise UsageError(
                "another asyncio task of this thread has set a mixture",
                where="mixture",
                mend="run each task's call on its own thread: `await asyncio.to_thread(model.generate, ...)`",
            )


class NextStep:
    """A logits processor of transformers that advances a mixture's schedules during one call of generate.

    transformers calls a logits processor after each forward pass, before the next token is chosen. NextStep then sets
    the weights of the following forward pass. If a schedule raises, NextStep keeps the error until its next call,
    because no forward pass follows the last token.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._prompt_width: int | None = None
        self._fault: Exception | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Advance the schedules, and return the scores unchanged.

        Raises:
            Exception: the error that a schedule raised in the previous call.
        """
        if self._fault is not None:
            raise self._fault
        width = input_ids.shape[1]
        if self._prompt_width is None:
            self._prompt_width = width
        try:
            # `input_ids` does not contain the token that is being chosen yet. The next pass makes the token after it.
            self._mixture.step(width - self._prompt_width + 1)
        except Exception as fault:
            self._fault = fault
        return scores


def _task() -> object:
    """Return the asyncio task that runs in this thread; None if no task is running."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # this thread has no event loop
        return None


def _checked_tokens(token_rows: Tensor, num_rows: int) -> Tensor:
    if token_rows.is_floating_point() or token_rows.numel() == 0:
        raise UsageError(
            f"rows must be a tensor of integers, but it has dtype {str(token_rows.dtype).removeprefix('torch.')} and "
            f"shape {list(token_rows.shape)}",
            where="rows",
            mend="give an int64 tensor that has the shape of input_ids",
        )
    first, last = int(token_rows.min()), int(token_rows.max())
    if first < 0 or last >= num_rows:
        raise UsageError(
            f"the numbers in rows range from {first} to {last}, but the number of profiles is {num_rows}",
            where="rows",
            mend=f"give numbers from 0 to {num_rows - 1}; for tokens of the base alone, add None to the profiles",
        )
    return token_rows.long()
