"""`FluencyGate`: reject answers that are broken, whatever style they have.

A scorer measures a style. Text that is broken can have any style, so a study also asks of each answer whether the bare
base finds it likely, whether it goes round in a loop, whether it ends, and whether it is in the prompt's script.

Shapes: N = answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias, get_args

import numpy as np

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.declare.fluency import FluencyBounds
from personalized_soups.errors import IncompatibleExpertsError, UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.mixing.fitting import fitting_rows
from personalized_soups.scoring.answer_batches import Floats, rows_of_answers
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.encoded_answers import EncodedAnswer, encode_answer
from personalized_soups.scoring.log_probs import answer_log_probs
from personalized_soups.scoring.sentences import ends
from personalized_soups.scoring.text_checks import distinct_share, script_share

if TYPE_CHECKING:
    from pathlib import Path

    from personalized_soups.generation.loading import Dtype

Check: TypeAlias = Literal["words", "script", "end", "loops", "likelihood"]
CHECKS: tuple[Check, ...] = get_args(Check)

# The most memory that the logits of one batch take, unless a single row takes more.
_LOGITS_BYTES = 1 << 29

# A text may have fewer tokens than were sampled for it, because a tokenizer joins what a model wrote in pieces. So an
# answer counts as cut at the limit from this share of it.
_CUT = 0.9


class MeasuredText(NamedTuple):
    """An answer with what the gate needs to know of it. It can be stored as JSON.

    Attributes:
        num_tokens: the number of tokens of the answer, without the end token.
        log_prob: their mean log-probability under the base, given the prompt. 0 without tokens.
        square: the mean of the squares of their log-probabilities.
        distinct: the share of distinct sequences of 4 words.
        script: the share of letters that are of a script of the prompt.
        has_words: whether the answer has a letter or a digit.
        ends: whether the answer ends where a sentence, a heading or a list item may end.
    """

    num_tokens: int
    log_prob: float
    square: float
    distinct: float
    script: float
    has_words: bool
    ends: bool


class FluencyGate:
    """Decides which answers are fluent, by bounds that are calibrated on the base's own answers.

    Log-probabilities are those of the bare base: an adapter of a PEFT model is disabled. The end token does not count,
    because an answer that is cut at a limit has none. Values have the precision of the model's dtype.

    Args:
        generator: the base with its tokenizer.
        bounds: the bounds. Without them, answers can only be measured.
        batch_size: the maximum number of answers in a forward pass. Batches are smaller if their logits would take more
            than 512 MiB.
        base: the folder or hub id of the base, to compare it with the bounds. By default, the place from which the
            model was loaded.

    Raises:
        UsageError: if `batch_size` is less than 1.
        IncompatibleExpertsError: if the bounds were calibrated on another base.

    Example:
        >>> bounds = FluencyBounds(typical=-1.0, between_texts=0.5, between_tokens=1.5, max_deviations=3.0)
        >>> gate = FluencyGate(Generator.open(TINY_BASE, device="cpu"), bounds)
        >>> gate.valid(["How do I clean a lamp?"] * 2, ["Dust the lamp.", "Lamp lamp lamp door zebra."])
        [True, False]
    """

    def __init__(
        self,
        generator: Generator,
        bounds: FluencyBounds | None = None,
        *,
        batch_size: int = 32,
        base: Path | str | None = None,
    ) -> None:
        if batch_size < 1:
            raise UsageError(
                f"batch_size is {batch_size}, but must be at least 1", where="batch_size", mend="give batch_size=32"
            )
        self._generator = generator
        self._batch_size = batch_size
        self.bounds = bounds
        if bounds is not None and bounds.base:
            own = base_fingerprint(base or str(generator.model.name_or_path))
            if own != bounds.base:
                raise IncompatibleExpertsError(
                    "the bounds of fluency were calibrated on another base",
                    where=bounds.place("base"),
                    mend="give the base of the calibration, or calibrate again with psoups scorer calibrate",
                )

    @classmethod
    def open(
        cls,
        base: Path | str,
        bounds: FluencyBounds | None = None,
        *,
        device: str = "auto",
        dtype: Dtype = "float32",
        batch_size: int = 32,
    ) -> Self:
        """Load a base, and return a gate with it.

        Raises:
            SoupError: if the base or the device is missing or not usable, or the bounds are those of another base.
        """
        return cls(Generator.open(base, device=device, dtype=dtype), bounds, batch_size=batch_size, base=base)

    def measure(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        on_done: Callable[[int], None] | None = None,
    ) -> list[MeasuredText]:
        """Return what the gate needs to know of each answer. This is the only part that computes with the model.

        Args:
            prompts: the prompt of each answer.
            answers: the answers. An answer that occurs several times is computed once.
            on_done: called after each batch with the number of different answers that are finished.

        Raises:
            ValueError: if there are not as many answers as prompts.
            InputError: if a prompt or answer cannot be encoded or is too long for the base.
            RunError: if a batch does not fit on the GPU. The message gives a smaller batch size.
        """
        items = [TextItem(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        table = rows_of_answers(
            [item for item in items if item.answer.strip()],
            encode=self._encoded,
            num_fitting=self._num_fitting,
            compute=self._log_probs,
            width=3,
            on_done=on_done,
        )
        rows = iter(table.tolist())
        return [_measured(item, next(rows) if item.answer.strip() else [0.0, 0.0, 0.0]) for item in items]

    def valid(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether each answer is fluent.

        Raises:
            UsageError: if the gate has no bounds.
            SoupError, ValueError: as for `measure`.
        """
        bounds = self._checked_bounds()
        return [not failed_checks(measured, bounds) for measured in self.measure(prompts, answers)]

    def _checked_bounds(self) -> FluencyBounds:
        if self.bounds is None:
            raise UsageError(
                "the gate has no bounds",
                where="bounds",
                mend="calibrate them: bounds = calibrate_fluency(gate.measure(prompts, answers))",
            )
        return self.bounds

    def _log_probs(self, answers: Sequence[EncodedAnswer]) -> Floats:
        """Return [N, 3] of one batch: the number of tokens, the mean log-probability, and the mean of the squares."""
        model: Any = self._generator.model
        width = max(len(answer.ids) for answer in answers)
        disabled = model.disable_adapter() if hasattr(model, "disable_adapter") else None
        with fitting_rows(model, len(answers), lambda: width):
            if disabled is None:
                log_probs = answer_log_probs(model, answers, self._generator.pad_id)
            else:
                with disabled:
                    log_probs = answer_log_probs(model, answers, self._generator.pad_id)
        counts = np.array([answer.num_answer for answer in answers], dtype=np.float64)
        means = log_probs.total[0].numpy() / counts
        return np.column_stack([counts, means, log_probs.squares[0].numpy() / counts])

    def _encoded(self, item: TextItem) -> EncodedAnswer:
        generator = self._generator
        most = getattr(generator.model.config, "max_position_embeddings", None)
        return encode_answer(
            generator.tokenizer,
            item.prompt,
            item.answer,
            num_embeddings=generator.num_embeddings,
            max_tokens=most if isinstance(most, int) else None,
            ended=False,
        )

    def _num_fitting(self, answers: Sequence[EncodedAnswer]) -> int:
        """Return how many of the next answers fit in one batch, at least 1."""
        vocabulary = self._generator.num_embeddings or 1
        longest, count = 0, 0
        for answer in answers[: self._batch_size]:
            longest = max(longest, answer.num_answer)
            row_bytes = (longest + 1) * vocabulary * int(self._generator.model.dtype.itemsize)
            if count and (count + 1) * row_bytes > _LOGITS_BYTES:
                break
            count += 1
        return count


def failed_checks(measured: MeasuredText, bounds: FluencyBounds) -> tuple[Check, ...]:
    """Return the checks that an answer fails, in the order of `CHECKS`. An answer is fluent if there are none.

    `words`: the answer has no letter and no digit. `script`: too many letters are of another script than the prompt.
    `end`: it is shorter than the limit, but does not end where a sentence ends. `loops`: it repeats itself.
    `likelihood`: the base finds it too unlikely.
    """
    if not measured.has_words:
        return ("words",)
    failed = {
        *fixed_checks(measured, min_script=bounds.min_script, max_new_tokens=bounds.max_new_tokens),
        *(["loops"] if measured.distinct < bounds.min_distinct else []),
        *(["likelihood"] if measured.log_prob < bounds.least_log_prob(max(1, measured.num_tokens)) else []),
    }
    return tuple(check for check in CHECKS if check in failed)


def fixed_checks(measured: MeasuredText, *, min_script: float, max_new_tokens: int | None) -> tuple[Check, ...]:
    """Return the failed checks that have no calibrated bound: words, script and end."""
    if not measured.has_words:
        return ("words",)
    script: tuple[Check, ...] = ("script",) if measured.script < min_script else ()
    is_short = max_new_tokens is not None and measured.num_tokens < _CUT * max_new_tokens
    return (*script, "end") if is_short and not measured.ends else script


def _measured(item: TextItem, row: Sequence[float]) -> MeasuredText:
    return MeasuredText(
        num_tokens=int(row[0]),
        log_prob=row[1],
        square=row[2],
        distinct=distinct_share(item.answer),
        script=script_share(item.prompt, item.answer),
        has_words=any(sign.isalnum() for sign in item.answer),
        ends=ends(item.answer),
    )
