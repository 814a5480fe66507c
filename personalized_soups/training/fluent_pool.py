"""Leave the answers that are not fluent out of a pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from personalized_soups.errors import InputError, UsageError
from personalized_soups.scoring.fluency import FluencyGate, failed_checks
from personalized_soups.scoring.fluency_calibration import num_failed
from personalized_soups.training.rollouts import Sampled


def fluent_pool(
    pool: Sequence[Sampled], gate: FluencyGate, *, on_done: Callable[[int], None] | None = None
) -> list[Sampled]:
    """Return the pool with only the fluent answers. A prompt may keep one answer or none.

    Args:
        pool: prompts with their answers.
        gate: decides which answers are fluent, given the plain prompt.
        on_done: called after each batch with the number of different answers that are finished.

    Raises:
        UsageError: if the gate has no bounds.
        InputError: if no answer is fluent. The message gives the number of answers that fail each check.
    """
    if gate.bounds is None:
        raise UsageError("the gate has no bounds", where="gate", mend="give a gate with bounds")
    prompts = [sampled.prompt for sampled in pool for _ in sampled.answers]
    measured = gate.measure(prompts, [answer for sampled in pool for answer in sampled.answers], on_done=on_done)
    passed = [not failed_checks(each, gate.bounds) for each in measured]
    if not any(passed):
        counts = ", ".join(f"{check} {count}" for check, count in num_failed(measured, gate.bounds).items())
        raise InputError(
            f"no answer is fluent: of {len(measured)} answers, the checks reject {counts or 'none'}",
            where=gate.bounds.place("max_deviations"),
            mend="read the answers, and calibrate the bounds on answers of this base at this temperature and length",
        )
    verdicts = iter(passed)
    return [_kept(sampled, [next(verdicts) for _ in sampled.answers]) for sampled in pool]


def _kept(sampled: Sampled, passed: Sequence[bool]) -> Sampled:
    instructions = sampled.instructions or (None,) * len(sampled.answers)
    kept = [place for place, is_fluent in enumerate(passed) if is_fluent]
    return Sampled(
        sampled.prompt,
        tuple(sampled.answers[place] for place in kept),
        tuple(instructions[place] for place in kept),
    )
