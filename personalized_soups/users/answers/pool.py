"""`QuestionPool`: questions that are prepared ahead, with the rewards of both answers. Needs numpy, but no torch.

A pool is a folder:

- `questions.jsonl` has one question in each line;
- `features.safetensors` has the rewards `a` and `b` of the answers, float32 [Q, D], and the prior of the weights,
  `prior_mean` [D] and `prior_covariance` [D, D], float64;
- `pool.json` says which rewards these are, and how the pool was made.

Shapes: Q = questions, D = base rewards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from personalized_soups.declare.declared import Declared
from personalized_soups.declare.evidence import Question
from personalized_soups.errors import FileFormatError, InputError, UsageError, choose_from
from personalized_soups.files.atomic import new_folder
from personalized_soups.files.file_names import FEATURES_FILE, POOL_FILE, QUESTIONS_FILE
from personalized_soups.files.strict_json import damaged, parse_json
from personalized_soups.scoring.base_rewards import BaseRewards, TextItem
from personalized_soups.scoring.bounded_rewards import BoundedRewards
from personalized_soups.users.answers.prior import Floats, GaussianPrior

Features = npt.NDArray[np.float32]


class PooledExpert(Declared):
    """An expert whose reward is in a pool."""

    name: str
    digest: str = Field(description="The digest of the expert's files.")
    side: str | None = Field(default=None, description="The side that the expert was trained for.")
    dimension: str | None = Field(default=None, description="The dimension of that side.")
    beta: float = Field(default=1.0, gt=0, description="The factor of the expert's implicit reward.")


class PoolRecord(Declared):
    """pool.json: the rewards of a question pool, and how the pool was made."""

    format_version: Literal[1] = 1
    names: tuple[str, ...] = Field(min_length=1, description="The name of each base reward.")
    digest: str = Field(description="The digest of the base rewards.")
    centres: tuple[float, ...] = Field(
        default=(), description="If the rewards are bounded: the value of each reward that becomes 0."
    )
    scales: tuple[float, ...] = Field(
        default=(), description="If the rewards are bounded: the distance from the centre at which each becomes 0.76."
    )
    experts: tuple[PooledExpert, ...] = Field(default=(), description="The experts, if the rewards are theirs.")
    base: str | None = Field(default=None, description="The folder or hub id of the base.")
    base_fingerprint: str | None = Field(default=None, description="The fingerprint of the base.")
    folders: tuple[str, ...] = Field(default=(), description="The folders of the experts, as they were given.")
    options: dict[str, Any] = Field(default_factory=dict, description="How the questions were made.")
    prior: dict[str, Any] = Field(default_factory=dict, description="How the prior of the weights was made.")
    versions: dict[str, str] = Field(default_factory=dict)
    files: tuple[str, ...] = Field(default=(), description="All files of the folder.")


@dataclass(frozen=True, eq=False)
class QuestionPool:
    """Questions with the rewards of both answers, and the prior of a user's reward weights.

    Attributes:
        record: the names of the rewards, and how the pool was made.
        questions: the questions. The first ones were chosen first, so any first part of them is a good smaller pool.
        a: the rewards of each question's answer `a`, [Q, D], float32.
        b: the rewards of each question's answer `b`, [Q, D], float32.
        prior: what is assumed of a user's weights before the first answer.
        folder: the folder of the pool; None if the pool is not written yet.

    Raises:
        ValueError: if the shapes do not fit, a reward is not finite, or two questions have the same id.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> pool = make_questions(model, ["How do I clean a lamp?"], num_questions=2)
        >>> pool.write("questions", overwrite=True).names[:2]
        ('concise', 'elementary')
        >>> QuestionPool.open("questions").questions == pool.questions
        True
    """

    record: PoolRecord
    questions: tuple[Question, ...]
    a: Features
    b: Features
    prior: GaussianPrior
    folder: Path | None = None

    def __post_init__(self) -> None:
        shape = (len(self.questions), len(self.record.names))
        for name, features in (("a", self.a), ("b", self.b)):
            if features.dtype != np.float32 or features.shape != shape:
                raise ValueError(f"{name} is {features.dtype} {features.shape}, but must be float32 {shape}")
            if not np.isfinite(features).all():
                raise ValueError(f"{name} has values that are not finite")
        if len(self.prior.mean) != shape[1]:
            raise ValueError(f"the prior is of {len(self.prior.mean)} weights, but there are {shape[1]} rewards")
        if len(self._places) != len(self.questions):
            raise ValueError("two questions have the same id")

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Read the pool in a folder.

        Raises:
            InputError: if the folder or a file is missing or cannot be read.
            FileFormatError: if a file is damaged, or the files do not fit each other.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(
                "the folder of questions does not exist",
                where=str(folder),
                mend="check the path, or make the questions: psoups questions make",
            )
        record = _read_record(folder / POOL_FILE)
        questions = tuple(_read_questions(folder / QUESTIONS_FILE))
        tensors = _read_features(folder / FEATURES_FILE)
        num = len(record.names)
        if "prior_mean" in tensors and "prior_covariance" in tensors:
            prior = (tensors["prior_mean"], tensors["prior_covariance"])
        else:
            prior = (np.zeros(num), np.eye(num))
        try:
            return cls(record, questions, tensors["a"], tensors["b"], GaussianPrior(*prior), folder)
        except ValueError as error:
            raise damaged(folder / FEATURES_FILE, f"the pool's files do not fit each other: {error}") from None

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the base rewards."""
        return self.record.names

    @property
    def prompts(self) -> list[str]:
        """The prompt of each question."""
        return [question.prompt for question in self.questions]

    @cached_property
    def differences(self) -> Floats:
        """`phi(a) - phi(b)` of each question, [Q, D], float64."""
        result: Floats = self.a.astype(np.float64) - self.b.astype(np.float64)
        return result

    def index(self, question: str) -> int:
        """Return the index of the question with an id.

        Raises:
            UsageError: if the pool has no such question.
        """
        if question not in self._places:
            raise UsageError(
                f"no question has the id {question!r}",
                where=str(self.folder or "the question pool"),
                mend=choose_from(question, self._places),
            )
        return self._places[question]

    def check_experts(self, digests: Mapping[str, str]) -> None:
        """Raise if the rewards of the pool are not those of the given experts. Further experts are ignored.

        Args:
            digests: the digest of each expert, from `expert_digest`, by name.

        Raises:
            UsageError: if an expert of the pool is missing or has changed.
        """
        missing = [expert.name for expert in self.record.experts if expert.name not in digests]
        changed = [
            expert.name
            for expert in self.record.experts
            if expert.name in digests and digests[expert.name] != expert.digest
        ]
        faults = [f"{', '.join(changed)} changed"] * bool(changed) + [f"{', '.join(missing)} missing"] * bool(missing)
        if faults:
            raise UsageError(
                f"the experts differ from those for which the questions were made: {'; '.join(faults)}",
                where=str(self.folder or "the question pool"),
                mend="make the questions again with these experts: psoups questions make",
            )

    def rewards(self, rewards: BaseRewards[TextItem]) -> BaseRewards[TextItem]:
        """Return base rewards in the units of the pool: bounded as those of the pool are, if these are bounded.

        Args:
            rewards: the base rewards of which the pool was made, for example `ImplicitRewards` of the same experts.
        """
        if not self.record.scales:
            return rewards
        return BoundedRewards(rewards, centres=self.record.centres, scales=self.record.scales)

    def with_prior(self, prior: GaussianPrior, **origin: Any) -> Self:
        """Return the pool with another prior. `origin` says how the prior was made."""
        return replace(self, prior=prior, record=self.record.replaced(prior=origin))

    def write(self, folder: Path | str, *, overwrite: bool = False) -> Self:
        """Write the pool to a new folder, completely or not at all, and return the pool with that folder.

        Args:
            folder: the folder.
            overwrite: replace an existing pool.

        Raises:
            OutputExistsError: if the folder exists and may not be replaced.
            RunError: if the disk is full.
        """
        from safetensors.numpy import save

        record = self.record.replaced(files=(POOL_FILE, QUESTIONS_FILE, FEATURES_FILE))
        tensors = {
            "a": self.a,
            "b": self.b,
            "prior_mean": self.prior.mean,
            "prior_covariance": self.prior.covariance,
        }
        lines = [json.dumps(question.model_dump(mode="json"), ensure_ascii=False) for question in self.questions]
        with new_folder(folder, overwrite) as scratch:
            text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
            (scratch / POOL_FILE).write_text(text + "\n", encoding="utf-8")
            (scratch / QUESTIONS_FILE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            data = save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
            (scratch / FEATURES_FILE).write_bytes(data)  # `save_file` would ignore the umask
        return replace(self, record=record, folder=Path(folder))

    @cached_property
    def _places(self) -> dict[str, int]:
        return {question.id: place for place, question in enumerate(self.questions)}


def _read_record(path: Path) -> PoolRecord:
    data = _read(path)
    try:
        parse_json(data, path)
        return PoolRecord.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise damaged(path, f"the key {key!r} is invalid: {first['msg']}") from None


def _read_questions(path: Path) -> Iterator[Question]:
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line:
            continue
        try:
            yield Question.model_validate_json(line)
        except ValidationError as error:
            raise FileFormatError(
                f"the line is not a question: {error.errors()[0]['msg']}",
                where=f"{path}:{number}",
                mend="make the pool again, or restore the file from a backup",
            ) from None


def _read_features(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors: dict[str, Any] = load(_read(path))
    except (SafetensorError, KeyError, ValueError) as error:
        raise damaged(path, f"the file is not a safetensors file: {error}") from None
    missing = [name for name in ("a", "b") if name not in tensors]
    if missing:
        raise damaged(path, f"the file has no tensor {' and no tensor '.join(missing)}")
    return tensors


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}",
            where=str(path),
            mend="give the folder of a question pool, which psoups questions make writes",
        ) from error
