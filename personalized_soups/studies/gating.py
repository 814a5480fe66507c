"""The gate of a study: calibrate it on the base's own answers, and apply it to answers that were measured before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.declare.fluency import FluencyBounds
from personalized_soups.declare.loader import dump, load
from personalized_soups.scoring.fluency import MeasuredText, failed_checks
from personalized_soups.scoring.fluency_calibration import calibrate_fluency
from personalized_soups.studies.answering import Answering
from personalized_soups.studies.folder import write_text

# The pool has the seeds from 1000 * seed.
_SEEDS = 500


@dataclass(frozen=True, slots=True)
class MeasuredGate:
    """A fluency gate for answers whose log-probabilities worker processes have computed.

    Attributes:
        bounds: the calibrated bounds.
        measured: what was measured of each prompt and answer. It grows while answers are generated.
    """

    bounds: FluencyBounds
    measured: Mapping[tuple[str, str], MeasuredText]

    def valid(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return whether each answer is fluent.

        Raises:
            KeyError: if an answer was not measured.
            ValueError: if there are not as many answers as prompts.
        """
        pairs = zip(prompts, answers, strict=True)
        return [not failed_checks(self.measured[pair], self.bounds) for pair in pairs]


def calibrated_gate(answering: Answering) -> MeasuredGate | None:
    """Return the gate of a study, or None if its recipe has none. Stored bounds are read.

    The base answers the training prompts as it answers test prompts: without instructions and at the same temperature.

    Raises:
        InputError: if there are too few answers for the share that the recipe asks for, or too many are broken.
    """
    study, folder, recipe = answering.study, answering.folder, answering.study.recipe.fluency
    if recipe is None:
        return None
    if not folder.fluency.is_file():
        prompts = study.train_prompts
        jobs = [
            answering.job(
                f"calibration-{turn}", None, prompts, seed=1000 * study.seed + _SEEDS + turn, measured_as=prompts
            )
            for turn in range(recipe.num_samples)
        ]
        answers = answering.answered("calibrating the fluency gate", "calibration", jobs)
        measured = [
            answering.measured[prompt, answer]
            for job in jobs
            for prompt, answer in zip(prompts, answers[job.name], strict=True)
        ]
        bounds = calibrate_fluency(
            measured,
            accept=recipe.accept,
            max_new_tokens=study.recipe.max_new_tokens,
            base=base_fingerprint(study.base),
        )
        write_text(folder.fluency, dump(bounds))
    return MeasuredGate(load(folder.fluency, FluencyBounds), answering.measured)
