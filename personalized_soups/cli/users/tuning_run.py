"""Run the search of `psoups tune`: read the user's data, load the model, and show the progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli import render
from personalized_soups.cli.bases import LoadOptions, catalogue_of
from personalized_soups.cli.sampling import SamplingOptions
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.evidence import Example
    from personalized_soups.declare.profile import Profile
    from personalized_soups.generation.prompts import PromptRequest
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.users.tuning.objective import Objective
    from personalized_soups.users.tuning.scored_answers import Rating
    from personalized_soups.users.tuning.tune import Tuning


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of the user: a file of examples, or a scorer with a file of prompts.

    Attributes:
        examples: the file of examples; None if there is a scorer.
        scorer: the name of the scorer; empty if there are examples.
        prompts: the file of prompts; None if there are examples.
        dimensions: the catalogue that declares the scorer. None is the shipped catalogue.
    """

    examples: Path | None
    scorer: str
    prompts: Path | None
    dimensions: Path | None


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """Options of the search, with the names of the arguments of `tune_weights`."""

    budget: int
    population: int | None
    sigma: float
    limit: float
    layer_groups: int | None
    allow_opposed: bool


def checked_evidence(
    examples: Path | None, scorer: str | None, prompts: Path | None, dimensions: Path | None
) -> Evidence:
    """Check the options for the user's data and return them.

    Raises:
        UsageError: if there are no data, or both kinds, or a scorer without prompts.
    """
    if (examples is None) == (scorer is None):
        raise UsageError(
            "exactly one of --examples and --scorer must be given",
            where="--examples, --scorer",
            mend="give --examples texts.jsonl, or give --scorer friendly --prompts prompts.txt",
        )
    if scorer is not None and prompts is None:
        raise UsageError(
            "--scorer rates answers to prompts, but no prompts are given",
            where="--prompts",
            mend="add --prompts prompts.txt",
        )
    if examples is not None and prompts is not None:
        raise UsageError(
            "--prompts has no effect with --examples, because the examples have their own prompts",
            where="--prompts",
            mend="remove --prompts, or give --scorer instead of --examples",
        )
    return Evidence(examples, scorer or "", prompts, dimensions)


@dataclass(frozen=True, slots=True)
class TuningRun:
    """A search with all its inputs.

    Attributes:
        evidence: the user's data.
        loading: how the base is loaded.
        sampling: how answers are sampled, for a scorer.
        search: the options of the search.
    """

    evidence: Evidence
    loading: LoadOptions
    sampling: SamplingOptions
    search: SearchOptions

    def tuned(self, library: ExpertLibrary, start: Profile | None, *, quiet: bool) -> Tuning:
        """Search, show the progress, and return the result. The first Ctrl-C ends the search early.

        Raises:
            SoupError: if the data, the base or the experts cannot be read, or an option is out of range.
        """
        # The user's data are read first, because loading the base is slow.
        examples, prompts, rating = self._data()
        from personalized_soups.launching.stop_requests import stop_requested
        from personalized_soups.mixing.model import SoupModel
        from personalized_soups.users.tuning.tune import tune_weights

        model = SoupModel.from_pretrained(
            self.loading.path,
            library,
            on=self.loading.on,
            device=self.loading.device,
            dtype=self.loading.dtype,
            same_base=self.loading.same_base,
        )
        objective = self._objective(model, examples, prompts, rating)
        search = self.search
        with stop_requested() as stop, render.progress("tuning", search.budget, quiet=quiet) as bar:
            return tune_weights(
                model,
                objective,
                start=start,
                budget=search.budget,
                population=search.population,
                sigma=search.sigma,
                limit=search.limit,
                layer_groups=search.layer_groups,
                allow_opposed=search.allow_opposed,
                seed=self.sampling.seed,
                on_generation=lambda done, best: bar.update(done, best=best),
                stop=stop,
            )

    def _data(self) -> tuple[list[Example], list[PromptRequest], Rating | None]:
        from personalized_soups.declare.dimension import Catalogue
        from personalized_soups.declare.loader import load
        from personalized_soups.generation.prompts import read_asked_prompts
        from personalized_soups.users.tuning.examples import read_examples
        from personalized_soups.users.tuning.scored_answers import rating_of

        evidence = self.evidence
        if evidence.examples is not None:
            return read_examples(evidence.examples), [], None
        assert evidence.prompts is not None
        catalogue = load(catalogue_of(self.loading.base, evidence.dimensions), Catalogue)
        return [], read_asked_prompts(evidence.prompts), rating_of(evidence.scorer, catalogue)

    def _objective(
        self, model: SoupModel, examples: Sequence[Example], prompts: Sequence[PromptRequest], rating: Rating | None
    ) -> Objective:
        from personalized_soups.users.tuning.likelihood import TextLikelihood
        from personalized_soups.users.tuning.scored_answers import ScoredAnswers

        if rating is None:
            return TextLikelihood(model, examples, batch_size=self.sampling.batch_size)
        model.generator.check(prompts)
        return ScoredAnswers(
            model,
            [request.prompt for request in prompts],
            rating,
            name=f"score of {self.evidence.scorer}",
            max_new_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            seed=self.sampling.seed,
            batch_size=self.sampling.batch_size,
        )
