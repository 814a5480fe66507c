"""The answers that are labelled: read from a pool file, or sampled from the base."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli import render
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.cli.bases import LoadOptions
    from personalized_soups.cli.sampling import SamplingOptions
    from personalized_soups.training.instructions import InstructedShare
    from personalized_soups.training.rollouts import Sampled


@dataclass(frozen=True, slots=True)
class PoolRequest:
    """A request for sampled answers, from an existing pool or from the base.

    Attributes:
        prompts: file of prompts. It may be None only if the pool exists.
        pool: file of sampled answers, which is read if it exists, else written. If None, no pool is written.
        journal: file that stores answers during sampling, so that an interrupted sampling can be resumed.
        num_samples: number of answers to each prompt.
        instructed: how many of them are sampled under an instruction, and under which.
        loading: how the base is loaded.
        sampling: how answers are sampled.
    """

    prompts: Path | None
    pool: Path | None
    journal: Path
    num_samples: int
    instructed: InstructedShare
    loading: LoadOptions
    sampling: SamplingOptions

    def answers(self, *, quiet: bool) -> list[Sampled]:
        """Return the answers in the pool if it exists. Otherwise, sample answers and write them to the pool.

        Raises:
            SoupError: if a file or the base cannot be read, or the prompts in the pool differ from `prompts`.
        """
        from personalized_soups.training.rollouts import read_pool, write_pool

        if self.pool is not None and self.pool.exists():
            answers = read_pool(self.pool)
            self._check_prompts(answers)
            return answers
        answers = self._sample(quiet=quiet)
        if self.pool is not None:
            write_pool(self.pool, answers)
            self.journal.unlink()
        return answers

    def _check_prompts(self, answers: list[Sampled]) -> None:
        from personalized_soups.generation.prompts import read_prompts

        if self.prompts is not None and read_prompts(self.prompts) != [sampled.prompt for sampled in answers]:
            raise UsageError(
                f"the prompts in the pool differ from the prompts in {self.prompts}",
                where=str(self.pool),
                mend="remove --prompts to use the pool as it is, or give a new file, e.g. --pool new-pool.jsonl",
            )

    def _sample(self, *, quiet: bool) -> list[Sampled]:
        from personalized_soups.generation.generator import Generator
        from personalized_soups.generation.prompts import read_asked_prompts
        from personalized_soups.training.resumable_sampling import sample_kept

        assert self.prompts is not None
        prompts = read_asked_prompts(self.prompts)
        generator = Generator.open(
            self.loading.path, on=self.loading.on, device=self.loading.device, dtype=self.loading.dtype
        )
        generator.check(prompts)
        total = len(prompts) * self.num_samples
        with ExitStack() as stack:
            bar: render.Bar | None = None

            def begin(done: int) -> None:
                nonlocal bar
                bar = stack.enter_context(render.progress("sampling answers", total, done=done, quiet=quiet))

            def advance(done: int) -> None:
                assert bar is not None
                bar.update(done)

            return sample_kept(
                generator,
                [line.prompt for line in prompts],
                kept=self.journal,
                base=self.loading.fingerprint,
                num_samples=self.num_samples,
                temperature=self.sampling.temperature,
                max_new_tokens=self.sampling.max_new_tokens,
                batch_size=self.sampling.batch_size,
                seed=self.sampling.seed,
                instructed=self.instructed,
                on_begin=begin,
                on_done=advance,
            )


def check_instructed(instructed: int, num_samples: int) -> None:
    """Check that no more answers are instructed than sampled.

    Raises:
        UsageError: if there are more.
    """
    if instructed > num_samples:
        raise UsageError(
            f"{instructed} answers are instructed, but only {num_samples} are sampled",
            where="--instructed",
            mend=f"give --instructed {num_samples} or less, or a larger --num-samples",
        )
