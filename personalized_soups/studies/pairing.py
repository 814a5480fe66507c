"""Make the preference pairs of a study: sample the base's answers once, and label them for every side."""

from __future__ import annotations

from dataclasses import dataclass

from personalized_soups.generation.prompts import with_text_before
from personalized_soups.studies.answering import Answering
from personalized_soups.training.data import write_pairs
from personalized_soups.training.instructions import InstructedShare, instructions_of
from personalized_soups.training.pairs import label_pool
from personalized_soups.training.rollouts import Sampled, read_pool, write_pool


@dataclass(frozen=True, slots=True)
class Pairing:
    """Makes the pool and the pairs. Existing files are kept.

    Attributes:
        answering: samples the answers.
    """

    answering: Answering

    def run(self) -> None:
        """Sample the base's answers once, and make pairs for every side from them.

        Raises:
            InputError: if a side has no pairs, because no two answers differ enough.
        """
        study, folder, recipe = self.answering.study, self.answering.folder, self.answering.study.recipe.pairs
        if not folder.pool.is_file():
            write_pool(folder.pool, self._sampled())
        pool = read_pool(folder.pool)
        for side in study.catalogue.sides:
            if not folder.pairs(side).is_file():
                labelled = label_pool(
                    pool,
                    side,
                    study.catalogue,
                    min_gap=recipe.min_gap,
                    max_pairs=recipe.max_pairs,
                    seed=study.seed,
                    conversational=True,
                    match_length=recipe.match_length,
                    whole_sentences=recipe.whole_sentences,
                )
                folder.pairs(side).parent.mkdir(parents=True, exist_ok=True)
                write_pairs(folder.pairs(side), labelled)

    def _sampled(self) -> list[Sampled]:
        """Sample plain answers, and answers under the instructions of the sides in turn, as the recipe says."""
        study, recipe = self.answering.study, self.answering.study.recipe.pairs
        prompts = study.train_prompts
        share = InstructedShare(recipe.instructed, instructions_of(study.catalogue))
        instructions = [share.of_prompt(at, num_samples=recipe.num_samples) for at in range(len(prompts))]
        jobs = []
        for turn in range(recipe.num_samples):
            asked = [
                str(with_text_before(prompt, own[turn] or ""))
                for prompt, own in zip(prompts, instructions, strict=True)
            ]
            seed = 1000 * study.seed + turn
            jobs.append(self.answering.job(f"sample-{turn}", None, asked, seed=seed, temperature=recipe.temperature))
        answers = self.answering.answered("sampling answers of the base", "pool", jobs)
        return [
            Sampled(prompt, tuple(answers[job.name][at] for job in jobs), instructions[at])
            for at, prompt in enumerate(prompts)
        ]
