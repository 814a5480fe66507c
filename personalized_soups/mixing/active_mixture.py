"""The mixture that is set: the weights of a batch's rows, and when they are written into the gates."""

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
    """The weights of one batch; `step` changes the weights that follow a schedule.

    Attributes:
        rows: the weights of each row.
        is_scheduled: whether a weight depends on the generated token's number.
        task: the asyncio task that made the mixture; None outside of tasks.
        is_innermost: returns whether the gates hold this mixture; None after the mixture has ended.

    Args:
        rows: the weights of each gate.
        gates: of the model.
        layers: names of the layers, in the order of their slots.
        token_rows: for packed sequences, `[B, T]`: the index in `rows` for each token.
        rows_each: how many rows of the batch each entry of `rows` is for; None if the only entry is for all rows.

    Raises:
        UsageError: if there are no rows, a token's index is out of range, or a weight does not fit into the model's
            dtype.
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
            raise UsageError("there are no profiles", where="profiles", mend="give one for each prompt")
        if rows_each is not None and rows_each < 1:
            raise UsageError(f"rows_each is {rows_each}", where="rows_each", mend="give 1 or more")
        self.rows = tuple(rows)
        self.is_scheduled = any(row.is_scheduled for row in rows)
        self._gates = gates
        self._layers = layers
        self._rows_each = rows_each
        self._token_rows = None if token_rows is None else _checked_tokens(token_rows, len(rows))
        self._step = 0
        # Made at once, so that a wrong weight raises before the mixture is set.
        self._tables = self._tables_at(0)
        self.task = _task()
        self.is_innermost: Callable[[], bool | None] = lambda: True

    def step(self, number: int) -> None:
        """Use the schedules' weights for the generated token `number` from the next forward pass on.

        Cached keys and values stay as they were computed.

        Raises:
            DeclarationError: if a schedule returns something other than a weight. The weights stay as they were.
            UsageError: if a weight does not fit into the model's dtype, or the mixture has ended.
        """
        is_innermost = self.is_innermost()
        if is_innermost is None:
            raise UsageError("the mixture has ended", where="mixture", mend="call `step` within the `with` block")
        # The table of plain numbers is the same at every step.
        if self.is_scheduled and number != self._step:
            # The new table first: if a schedule raises, nothing has changed.
            self._tables = self._tables_at(number)
            self._step = number
            # Otherwise the gates hold an inner mixture, and `settle` applies this one when the inner one has ended.
            if is_innermost:
                self.apply()

    def apply(self) -> None:
        """Write the weights into the gates."""
        gates = self._gates
        gates.set(*self._tables)
        gates.rows_each = self._rows_each
        gates.token_rows = self._token_rows
        # The switch comes last, after everything that a layer reads.
        gates.is_on = True

    def start(self) -> list[NextStep]:
        """Start the schedules of an answer, and return the logits processors that step them.

        The prompt is read with the weights of step 0, also by the second answer within a mixture.
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
    """Writes weights into the gates: those of the innermost mixture, else the idle weights, else none.

    One thread at a time sets mixtures; other threads wait until its outermost mixture has ended.

    Attributes:
        lock: held while a mixture is set.
        idle_weights: returns the weights of every row while no mixture is set; empty weights are the bare base.

    Args:
        layers: of the model.
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
        """The mixture that the gates hold; None if none is set."""
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
            rows: returns the weights of each row. It is called once other threads have left their mixtures.
            token_rows: as `Mixture`.
            rows_each: as `Mixture`.

        Raises:
            DeclarationError: as `Mixture`.
            UsageError: as `Mixture`, and if another asyncio task of this thread has set a mixture.
        """
        with self.lock:
            self._check_task()
            # Before the rows are made: moved layers may have new slots and a new dtype.
            self._layers.follow()
            mixture = self.new_mixture(rows(), token_rows=token_rows, rows_each=rows_each)
            mixture.is_innermost = lambda: None if mixture not in self._set else self._set[-1] is mixture
            self._set.append(mixture)
            self._setter = threading.get_ident()
            try:
                mixture.apply()
                yield mixture
            finally:
                # Not `pop`: contexts that are entered by hand may be left in any order.
                self._set.remove(mixture)
                if not self._set:
                    self._setter = None
                self.settle()

    @contextmanager
    def as_set(self) -> Iterator[Mixture | None]:
        """Keep this thread's mixture, or the idle weights, within the block; other threads' mixtures wait."""
        with self.lock:
            self._check_task()
            yield self.innermost

    def check(self, weights: ExpertWeights) -> None:
        """Raise what a mixture of these weights would raise. Sets nothing and waits for nobody.

        Raises:
            UsageError, DeclarationError: as `Mixture`.
        """
        plain = {expert: weight for expert, weight in weights.weights.items() if isinstance(weight, float)}
        # The short way for most requests: plain numbers need no table.
        if len(plain) < len(weights.weights) or not self._layers.gates.layout.holds(plain):
            self.new_mixture([weights])

    def settle(self) -> None:
        """Write into the gates the weights that belong there now."""
        # Experts, dtype or device may have changed since the weights were written.
        self._layers.follow()
        if self._set:
            self._set[-1].apply()
            return
        weights = self.idle_weights()
        self._layers.gates.is_on = False  # stays off where the weights do not fit and `new_mixture` raises
        if weights.weights:
            self.new_mixture([weights]).apply()

    def new_mixture(
        self, rows: Sequence[ExpertWeights], *, token_rows: Tensor | None = None, rows_each: int | None = None
    ) -> Mixture:
        """Return a mixture of these rows that is not set yet. Raises as `Mixture`."""
        names = list(self._layers.by_name)
        return Mixture(rows, self._layers.gates, names, token_rows=token_rows, rows_each=rows_each)

    def _check_task(self) -> None:
        # A mixture that was set outside of any task holds for the tasks within it.
        if self._set and self._set[-1].task is not None and self._set[-1].task is not _task():
            raise UsageError(
                "another asyncio task of this thread has set a mixture",
                where="mixture",
                mend="let each task generate on a thread of its own: asyncio.to_thread(model.generate, ...)",
            )


class NextStep:
    """A logits processor of transformers that steps a mixture; made for one call of generate.

    transformers calls it after each forward pass, whose logits choose the next token. The weights that it sets are
    those of the following forward pass. After the last token no pass follows, so an error of a schedule is kept and
    raised only if there is a next token.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._prompt_width: int | None = None
        self._fault: Exception | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores unchanged.

        Raises:
            Exception: the schedule's error for the token that is being chosen.
        """
        if self._fault is not None:
            raise self._fault
        width = input_ids.shape[1]
        if self._prompt_width is None:
            self._prompt_width = width
        try:
            # The token that is being chosen is not in `input_ids` yet, so the next pass makes token width + 1.
            self._mixture.step(width - self._prompt_width + 1)
        except Exception as fault:
            self._fault = fault
        return scores


def _task() -> object:
    """Return the asyncio task that runs in this thread, None outside of tasks."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # this thread has no event loop
        return None


def _checked_tokens(token_rows: Tensor, num_rows: int) -> Tensor:
    if token_rows.is_floating_point() or token_rows.numel() == 0:
        raise UsageError(
            f"rows must hold integers, got {str(token_rows.dtype).removeprefix('torch.')} of shape "
            f"{list(token_rows.shape)}",
            where="rows",
            mend="give an int64 tensor of the shape of input_ids",
        )
    first, last = int(token_rows.min()), int(token_rows.max())
    if first < 0 or last >= num_rows:
        raise UsageError(
            f"rows goes from {first} to {last}, but there are {num_rows} profiles",
            where="rows",
            mend=f"give numbers from 0 to {num_rows - 1}; a profile of None is the base alone",
        )
    return token_rows.long()
