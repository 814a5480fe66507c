"""Open the pool of questions of an interview, or make it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli import render
from personalized_soups.cli.bases import LoadOptions
from personalized_soups.cli.question_pools import pool_progress, prompts_of
from personalized_soups.errors import OutputExistsError, UsageError

if TYPE_CHECKING:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.users.answers.pool import QuestionPool

# Fewer than `psoups questions make` makes, because the user waits for them.
_NUM_QUESTIONS = 100
_SEED = 0


@dataclass(frozen=True, slots=True)
class PoolSource:
    """Where the questions of an interview come from.

    Attributes:
        folder: the folder of the pool as it was given, or None for the default folder.
        experts: the folders of the experts.
        loading: how the base is loaded.
        quiet: show no progress.
    """

    folder: Path | None
    experts: Sequence[Path]
    loading: LoadOptions
    quiet: bool

    def open(self, library: ExpertLibrary, model: Callable[[], SoupModel]) -> QuestionPool:
        """Return the pool. If no folder was given and there is no pool in the default folder, make it.

        Args:
            library: the experts.
            model: returns the base with the experts. It is called only if a pool must be made.

        Raises:
            SoupError: if the pool cannot be read or made, or if it was made with other experts or another base.
        """
        from personalized_soups.users.answers.pool import QuestionPool

        folder = self.folder or self.default_folder()
        if self.folder is None and not folder.exists():
            return self._made(folder, model())
        pool = QuestionPool.open(folder)
        self._check(pool, folder, library)
        return pool

    def default_folder(self) -> Path:
        """Return the folder next to the experts, or in the current folder if the experts' folder is read-only."""
        experts = self.experts[0].absolute()
        neighbor = experts.with_name(f"{experts.name}-questions")
        if neighbor.exists() or os.access(experts.parent, os.W_OK):
            return _short(neighbor)
        return Path(neighbor.name)

    def _made(self, folder: Path, model: SoupModel) -> QuestionPool:
        from personalized_soups.users.answers.making import make_questions
        from personalized_soups.users.answers.pool import QuestionPool

        try:
            prompts = prompts_of(None, self.loading.base, _NUM_QUESTIONS, _SEED)
        except UsageError as error:
            raise UsageError(
                f"there are no questions yet, and no prompts to make them from: {folder} does not exist",
                where="pool",
                mend=f"write a file of prompts, and make the questions: {self._command(folder, prompts='prompts.txt')}",
            ) from error
        render.say(f"making {_NUM_QUESTIONS} questions in {folder}, once for these experts")
        with pool_progress(quiet=self.quiet) as on_progress:
            pool = make_questions(
                model,
                prompts,
                num_questions=_NUM_QUESTIONS,
                seed=_SEED,
                base=self.loading.path,
                folders=self.experts,
                on_progress=on_progress,
            )
        try:
            return pool.write(folder)
        except OutputExistsError:  # another terminal has made the same pool in the meantime
            return QuestionPool.open(folder)

    def _check(self, pool: QuestionPool, folder: Path, library: ExpertLibrary) -> None:
        """Raise if the pool's rewards are not those of these experts on this base."""
        from personalized_soups.adapters.fingerprint import base_fingerprint
        from personalized_soups.scoring.expert_digests import expert_digest

        made = pool.record.options
        command = self._command(
            folder, prompts=made.get("prompts"), num_questions=made.get("num_questions"), overwrite=True
        )
        again = f"make the questions again: {command}"
        pooled = [expert.name for expert in pool.record.experts]
        if list(pool.names) != pooled:
            raise UsageError(
                f"the rewards of the questions are {', '.join(pool.names)}, which are not the rewards of experts",
                where=str(folder),
                mend=again,
            )
        try:
            pool.check_experts({name: expert_digest(library[name].folder) for name in pooled if name in library})
        except UsageError as error:
            raise UsageError(error.what, where=str(folder), mend=again) from error
        new = [name for name in library if name not in pooled]
        if new:
            render.say(f"the questions in {folder} do not cover {', '.join(new)}; {again}")
        fingerprint = pool.record.base_fingerprint
        if self.loading.same_base or fingerprint is None or fingerprint == base_fingerprint(self.loading.path):
            return
        raise UsageError(
            f"the questions were made with another base, {pool.record.base}, not with {self.loading.base}",
            where=str(folder),
            mend=f"give that base, or {again}",
        )

    def _command(
        self, folder: Path, *, prompts: str | None, num_questions: int | None = None, overwrite: bool = False
    ) -> str:
        """Return the command that makes the pool with the experts and the base of this interview."""
        words = ["psoups", "questions", "make"]
        words += [word for experts in self.experts for word in ("--experts", str(experts))]
        words += ["--base", self.loading.base, *(("--prompts", prompts) if prompts else ()), "--out", str(folder)]
        words += [] if num_questions is None else ["--num-questions", str(num_questions)]
        return shlex.join([*words, *(["--overwrite"] if overwrite else [])])


def _short(path: Path) -> Path:
    """Return the path relative to the current folder if it is in it, else unchanged."""
    current = Path.cwd()
    return path.relative_to(current) if path.is_relative_to(current) else path
