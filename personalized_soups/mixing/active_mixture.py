"""The mixture that is set: a batch's rows, written into the gates at each step; and what is set where none is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.errors import UsageError
from personalized_soups.mixing.gates import Gates
from personalized_soups.mixing.layers import MixedLayers
from personalized_soups.mixing.weight_table import weight_table


class Mixture:
    """The soups of one batch; `step` moves those whose weights follow a schedule.

    Args:
        rows: a row of weights for each gate.
        gates: of the model.
        layers: names of the layers, in the order of their slots.
        token_rows: of packed sequences, `[B, T]`, which of `rows` each token belongs to.
        rows_each: rows of the batch that each of `rows` has; None where the only one is for all rows there are.

    Raises:
        UsageError: if there are no rows, the tokens name others, or a weight does not fit into the model's dtype.
        DeclarationError: if a weight's pattern matches no layer, or a schedule gives no number.
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
        self._tables = self._tables_at(0)
        self.task = _task()
        # which of them the gates hold is for `ActiveMixture` to say
        self.is_innermost: Callable[[], bool | None] = lambda: True

    def step(self, number: int) -> None:
        """Weigh by the schedules' values for the generated token `number`, from the next forward on.

        Keys and values that are cached stay as they were computed.

        Raises:
            UsageError, DeclarationError: if a schedule gives what is no weight; the weights stay as they were.
                UsageError if the mixture has ended.
        """
        is_innermost = self.is_innermost()
        if is_innermost is None:
            raise UsageError("the mixture has ended", where="mixture", mend="step it within its block")
        if self.is_scheduled and number != self._step:
            self._tables = self._tables_at(number)
            self._step = number
            if is_innermost:
                self.apply()

    def apply(self) -> None:
        """Write the rows into the gates."""
        gates = self._gates
        gates.set(*self._tables)
        gates.rows_each = self._rows_each
        gates.token_rows = self._token_rows
        gates.is_on = True

    def _tables_at(self, step: int) -> tuple[Tensor, Tensor | None]:
        tables = weight_table([row.at(step) for row in self.rows], self._gates.experts, self._layers)
        self._gates.check(*tables)
        return tables


class ActiveMixture:
    """What the gates hold: the mixture that was set last and has not ended, else the row that is served, else nothing.

    One thread at a time sets mixtures; another's waits until the outermost has ended.

    Args:
        layers: of the model.
        scaled: gives a served row the experts' scales.
    """

    def __init__(self, layers: MixedLayers, scaled: Callable[[ExpertWeights], ExpertWeights]) -> None:
        self.lock = threading.RLock()
        self._layers = layers
        self._scaled = scaled
        self._set: list[Mixture] = []
        self._setter: int | None = None  # the thread
        self._served = ExpertWeights()
        self._is_enabled = True
        layers.when_moved = self.settle

    @property
    def innermost(self) -> Mixture | None:
        """The mixture that is set."""
        return self._set[-1] if self._set else None

    @property
    def is_set_here(self) -> bool:
        """Whether this thread has set it."""
        return self._setter == threading.get_ident()

    @property
    def served(self) -> ExpertWeights:
        """The row that serves where no mixture is set; one without weights is the bare base."""
        return self._served if self._is_enabled else ExpertWeights()

    @contextmanager
    def mixture(
        self, rows: Callable[[], Sequence[ExpertWeights]], *, token_rows: Tensor | None, rows_each: int | None
    ) -> Iterator[Mixture]:
        """Set a mixture within the block; `rows` is called once this thread has its turn.

        Raises:
            UsageError, DeclarationError: as Mixture; UsageError where another asyncio task of this thread has its own.
        """
        with self.lock:
            self._check_task()
            self._layers.follow()
            mixture = self._made(rows(), token_rows=token_rows, rows_each=rows_each)
            mixture.is_innermost = lambda: None if mixture not in self._set else self._set[-1] is mixture
            self._set.append(mixture)
            self._setter = threading.get_ident()
            try:
                mixture.apply()
                yield mixture
            finally:
                self._set.remove(mixture)  # its own, whatever order blocks end in
                if not self._set:
                    self._setter = None
                self.settle()

    @contextmanager
    def as_set(self) -> Iterator[Mixture | None]:
        """Keep what this thread has set, or else what is served, within the block; other threads' mixtures wait."""
        with self.lock:
            self._check_task()
            yield self.innermost

    def serve(self, row: ExpertWeights) -> None:
        """Serve all rows with these weights where no mixture is set.

        Raises:
            UsageError: if a weight follows the tokens: nothing counts them here. As Mixture, and nothing has changed.
            DeclarationError: as Mixture, and nothing has changed.
        """
        if row.is_scheduled:
            raise UsageError(
                "a weight is a function of the token's number, which nothing counts between calls",
                where="weights",
                mend="give it with the prompt: generate(prompts, [profile])",
            )
        with self.lock:
            if row.weights:
                self._made([self._scaled(row)], token_rows=None, rows_each=None)
            self._served, self._is_enabled = row, True
            self.settle()

    def check(self, row: ExpertWeights) -> None:
        """Raise what a mixture of this row would; nothing is set.

        Raises:
            UsageError, DeclarationError: as Mixture.
        """
        plain = {expert: weight for expert, weight in row.weights.items() if isinstance(weight, float)}
        if len(plain) < len(row.weights) or not self._layers.gates.holds(plain):
            self._made([row], token_rows=None, rows_each=None)

    def enable(self, is_enabled: bool) -> None:
        """Serve the row, or be the bare base."""
        with self.lock:
            self._is_enabled = is_enabled
            self.settle()

    def forget(self, experts: Collection[str]) -> None:
        """Serve no other experts than these, by no patterns of layers that are gone."""
        self._served = self._served.restricted(experts, list(self._layers.by_name))
        self.settle()

    def settle(self) -> None:
        """Write into the gates what they shall hold now."""
        self._layers.follow()
        if self._set:
            self._set[-1].apply()
        elif self.served.weights:
            self._layers.gates.is_on = False  # should the weights not fit
            self._made([self._scaled(self.served)], token_rows=None, rows_each=None).apply()
        else:
            self._layers.gates.is_on = False

    def _check_task(self) -> None:
        # one that was set outside of any task holds for the tasks within
        if self._set and self._set[-1].task is not None and self._set[-1].task is not _task():
            raise UsageError(
                "another task of this thread has set a mixture",
                where="mixture",
                mend="let each task generate on a thread of its own: asyncio.to_thread(model.generate, ...)",
            )

    def _made(self, rows: Sequence[ExpertWeights], *, token_rows: Tensor | None, rows_each: int | None) -> Mixture:
        names = list(self._layers.by_name)
        return Mixture(rows, self._layers.gates, names, token_rows=token_rows, rows_each=rows_each)


class NextStep:
    """A logits processor of transformers that moves a mixture on; made for one call of generate.

    It is called after each forward, whose logits make the next token: the weights that it sets are those of the forward
    after that. After the last token there is none, so a schedule that ends there is at fault only if there is.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._prompt_width: int | None = None
        self._fault: Exception | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are.

        Raises:
            Exception: what the schedule raised for the token that is being chosen.
        """
        if self._fault is not None:
            raise self._fault
        width = input_ids.shape[1]
        if self._prompt_width is None:
            self._prompt_width = width
        try:
            self._mixture.step(width - self._prompt_width + 1)
        except Exception as fault:
            self._fault = fault
        return scores


def _task() -> object:
    """Return the asyncio task that runs, None outside of any."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop in this thread
        return None


def _checked_tokens(token_rows: Tensor, num_rows: int) -> Tensor:
    if token_rows.is_floating_point() or token_rows.numel() == 0:
        raise UsageError("rows holds no whole numbers", where="rows", mend="give an int64 tensor of the tokens' shape")
    low, high = int(token_rows.min()), int(token_rows.max())
    if low < 0 or high >= num_rows:
        raise UsageError(
            f"rows goes from {low} to {high}, there are {num_rows} profiles",
            where="rows",
            mend=f"number the profiles from 0 to {num_rows - 1}; one of None is the base alone",
        )
    return token_rows.long()
