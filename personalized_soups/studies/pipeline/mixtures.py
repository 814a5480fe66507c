"""Answer the same prompts with many mixtures, line by line into a file. An interrupted run is resumed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.declare.profile import Profile
from personalized_soups.declare.run_steps import ChooseStep, InterferenceStep, SweepStep
from personalized_soups.files.lines import growing_lines
from personalized_soups.studies.pipeline.steps import Report
from personalized_soups.studies.pipeline.world import World

if TYPE_CHECKING:
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.mixing.personal_model import PersonalModel


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture that answers all prompts.

    Attributes:
        key: what the lines of its answers say about it, as JSON values.
        profile: the mixture. None is the base alone.
    """

    key: Mapping[str, Any]
    profile: Profile | None


def answer_mixtures(
    out: Path,
    mixtures: Sequence[Mixture],
    prompts: Sequence[str],
    *,
    world: World,
    step: ChooseStep | SweepStep | InterferenceStep,
    experts: Sequence[Path],
    seed: int,
    report: Report,
) -> None:
    """Answer all prompts with all mixtures, and write a line for each answer.

    A merge of another method than linear is an adapter, which exists while its batch is answered.

    Args:
        out: the file to write: the key of the mixture, `prompt` and `answer`.
        mixtures: the mixtures.
        prompts: the prompts. All mixtures answer a prompt with the same random numbers.
        world: the base and the device.
        step: how answers are generated.
        experts: the folders of the experts.
        seed: the seed of the sampling.
        report: called with the progress.
    """
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.mixing.personal_answers import answer

    jobs = [(mixture, at) for mixture in mixtures for at in range(len(prompts))]
    size = step.batch_size
    library = ExpertLibrary.open(*experts)
    model: SoupModel | None = None
    with growing_lines(out, {}, overwrite=True) as lines:
        # A batch that was begun is answered as a whole again: rounding depends on the batch.
        start = lines.num_done // size * size
        for first in range(start, len(jobs), size):
            model = model or world.soup_model(experts)
            batch = jobs[first : first + size]
            with tempfile.TemporaryDirectory() as scratch:
                merger = _Merger(library, Path(scratch))
                texts = answer(
                    model,
                    [prompts[at] for _, at in batch],
                    [merger.model_of(mixture.profile) for mixture, _ in batch],
                    max_new_tokens=step.max_new_tokens,
                    temperature=step.temperature,
                    seed=seed,
                    batch_size=len(batch),
                    places=[at for _, at in batch],
                )
            found = [
                {**mixture.key, "prompt": prompts[at], "answer": text}
                for (mixture, at), text in zip(batch, texts, strict=True)
            ]
            lines.add(found[max(0, lines.num_done - first) :])
            report(f"{min(first + size, len(jobs))}/{len(jobs)} answers")


class _Merger:
    """Makes the personal model of a profile. Equal profiles share one merged adapter."""

    def __init__(self, library: Any, scratch: Path) -> None:
        self._library = library
        self._scratch = scratch
        self._merged: dict[str, Path] = {}

    def model_of(self, profile: Profile | None) -> PersonalModel:
        """Return the model of a profile."""
        from personalized_soups.merging.writing.adapter import merge
        from personalized_soups.mixing.personal_model import PersonalModel

        if profile is None or profile.method == "linear":
            return PersonalModel(profile=profile)
        key = profile.model_dump_json()
        if key not in self._merged:
            folder = self._scratch / str(len(self._merged))
            self._merged[key] = merge(self._library, profile).write(folder)
        return PersonalModel(adapter=self._merged[key])
