"""Run a sweep: write the answers, their scores and a picture to one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.cli import render
from personalized_soups.cli.bases import catalogue_of
from personalized_soups.cli.generate.outputs import reporting_kept_answers
from personalized_soups.errors import DeclarationError, UsageError, choose_from

if TYPE_CHECKING:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.cli.bases import LoadOptions
    from personalized_soups.cli.sampling import SamplingOptions
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.files.lines import GrowingLines
    from personalized_soups.studies.sweep import Sweep


@dataclass(frozen=True, slots=True)
class SweepRun:
    """A sweep from one expert to another, with its inputs and its output folder.

    Attributes:
        sweep: the two experts, the steps and the scale.
        experts: the two experts.
        side: the side that the second expert was trained for. The answers are scored for this side.
        catalogue: the catalogue with the scorer of `side`. If None, the score of an answer is its number of words.
        prompts: file of prompts.
        folder: the output folder.
        loading: how the base is loaded.
        sampling: how answers are sampled.
    """

    sweep: Sweep
    experts: ExpertLibrary
    side: str
    catalogue: Catalogue | None
    prompts: Path
    folder: Path
    loading: LoadOptions
    sampling: SamplingOptions

    def results(self, *, overwrite: bool, quiet: bool) -> dict[str, Any]:
        """Answer the prompts, score the answers, draw the curve and return the results.

        If the folder already holds all answers and `overwrite` is false, no answer is generated. The answers are still
        scored and drawn again, because the catalogue may have changed.

        Raises:
            SoupError: if a prompt or the base cannot be read, or the folder holds a run with different inputs.
        """
        from personalized_soups.files.lines import growing_lines, is_whole
        from personalized_soups.generation.prompts import read_asked_prompts
        from personalized_soups.studies.sweep import ANSWERS, RESULTS

        prompts = read_asked_prompts(self.prompts)
        settings = self._settings()
        has_all = _has_settings(self.folder / RESULTS, settings) and is_whole(self.folder / ANSWERS, len(prompts))
        if has_all and not overwrite:
            return self._score(settings)
        # Scoring is inside the block, so that a run that is killed during scoring can be resumed.
        with growing_lines(self.folder / ANSWERS, settings, overwrite=overwrite) as lines:
            self._answer(prompts, lines, quiet=quiet)
            return self._score(settings)

    def _settings(self) -> dict[str, Any]:
        """Return all inputs that affect the answers. A run can be resumed only with the same inputs."""
        from personalized_soups.files.digest import digest_file

        return {
            "base": self.loading.fingerprint,
            "experts": {
                name: [digest_file(path) for path in expert.adapter.files] for name, expert in self.experts.items()
            },
            "prompts": digest_file(self.prompts),
            "steps": self.sweep.num_steps,
            "scale": self.sweep.scale,
            "dtype": self.loading.dtype,
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "seed": self.sampling.seed,
        }

    def _answer(self, prompts: Any, lines: GrowingLines, *, quiet: bool) -> None:
        from personalized_soups.mixing.model import SoupModel
        from personalized_soups.studies.sweep import PICTURE, RESULTS, answer_sweep

        model = SoupModel.from_pretrained(
            self.loading.path,
            self.experts,
            on=self.loading.on,
            device=self.loading.device,
            dtype=self.loading.dtype,
            same_base=self.loading.same_base,
        )
        model.generator.check(prompts)
        for name in (RESULTS, PICTURE):  # they belong to earlier answers
            (self.folder / name).unlink(missing_ok=True)
        if lines.num_done:
            render.say(f"resuming: the answers to {lines.num_done} of {len(prompts)} prompts are written already")
        with (
            render.progress("sweeping", len(prompts), done=lines.num_done, quiet=quiet) as bar,
            reporting_kept_answers(lines.path),
        ):
            answer_sweep(
                model,
                self.sweep,
                [line.prompt for line in prompts],
                lines,
                batch_size=self.sampling.batch_size,
                on_done=bar.update,
                max_new_tokens=self.sampling.max_new_tokens,
                temperature=self.sampling.temperature,
                seed=self.sampling.seed,
            )

    def _score(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        from personalized_soups.studies.sweep import ANSWERS, PICTURE, RESULTS, draw_sweep, score_sweep

        scores = score_sweep(self.folder / ANSWERS, self.sweep, self.catalogue, self.side)
        results = scores | {"settings": settings}
        (self.folder / RESULTS).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        draw_sweep(results, self.folder / PICTURE)
        return results


def two_experts(library: ExpertLibrary, names: tuple[str, str]) -> ExpertLibrary:
    """Return a library that contains only the two named experts of `library`.

    Raises:
        UsageError: if `library` has no expert of that name.
    """
    from personalized_soups.adapters.library import ExpertLibrary

    for name in names:
        if name not in library:
            raise UsageError(f"no expert is called {name!r}", where=library.where, mend=choose_from(name, library))
    return ExpertLibrary({name: library[name].folder for name in names}, where=library.where)


def scoring_catalogue(side: str, base: str, dimensions: Path | None) -> Catalogue | None:
    """Return the catalogue with the scorer of `side`, or None if the shipped catalogue has no such scorer.

    Raises:
        DeclarationError: if the given catalogue cannot be read, or has no scorer for the side.
    """
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load

    catalogue = load(catalogue_of(base, dimensions), Catalogue)
    try:
        catalogue.scorer_of(side)
    except DeclarationError:
        if dimensions is not None:
            raise
        return None
    return catalogue


def _has_settings(results: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether the file holds the results of a run with these settings."""
    try:
        return bool(json.loads(results.read_text(encoding="utf-8"))["settings"] == settings)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
