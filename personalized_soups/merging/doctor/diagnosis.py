"""The doctor's results: findings about experts, and the measurements behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding about experts.

    Attributes:
        severity: `error` if the experts cannot be merged, `warning` if the soup may surprise, `note` if neither.
        kind: a stable name of the rule, for programs.
        what: the finding, in one sentence with the values.
        where: the experts, tensors or files.
        mend: what to do about it.
    """

    severity: Severity
    kind: str
    what: str
    where: str
    mend: str


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """An expert whose files are sound.

    Attributes:
        name: the expert's name.
        folder: the expert's folder.
        dimension: the preference dimension of the expert's side; None if unknown.
        rank: the rank of its modules, or the lowest and the highest: `4`, `2 to 8`.
        scaling: the scaling of its modules, or the lowest and the highest.
        num_modules: the number of modules that it adapts.
        dtype: the dtypes of its tensors, as its file names them.
        norm: the Frobenius norm of its low-rank deltas, all modules as one vector; None if it holds NaN or infinity.
        relative: `norm` divided by the norm of the base's tensors that it changes; None without a base.
        weight: the profile's weight; None without a profile.
    """

    name: str
    folder: str
    dimension: str | None
    rank: str
    scaling: str
    num_modules: int
    dtype: str
    norm: float | None
    relative: float | None
    weight: float | None


@dataclass(frozen=True, slots=True)
class Pair:
    """Measurements of two experts' low-rank deltas. A number is None if the experts share no module or a delta is 0.

    Attributes:
        one: the first expert's name.
        other: the second expert's name.
        cosine: the cosine of the angle between their deltas, all modules as one vector.
        inputs: the mean squared cosine of the principal angles between the row spaces of their A's.
        outputs: the mean squared cosine of the principal angles between the column spaces of their B's.
        opposed: the share of energy (squared norm) in entries where their signs differ, the mean of both experts'.
    """

    one: str
    other: str
    cosine: float | None
    inputs: float | None
    outputs: float | None
    opposed: float | None


@dataclass(frozen=True, slots=True)
class Pile:
    """The Frobenius norm of a profile's weighted sum of deltas, with two values to compare it with.

    Attributes:
        norm: `|sum w d|`.
        orthogonal: `sqrt(sum |w d|^2)`, the norm if the experts were orthogonal.
        most: `sum |w d|`, the norm if all weighted experts had one direction.
    """

    norm: float
    orthogonal: float
    most: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of `diagnose`.

    Attributes:
        findings: all findings, errors first.
        experts: facts about each expert whose files are sound.
        pairs: measurements of each pair of those experts.
        rows_looked_at: in words, the rows in which opposite signs were counted.
        shares_basis: whether all experts have the same A in every module; None if they do not fit together.
        rank: the rank of their exact soup as an adapter; None if they do not fit together.
        vllm_max_lora_rank: the smallest --max-lora-rank with which vLLM loads that adapter; None if there is none.
        pile: the norms of the profile's weighted sum; None without a profile, or if an expert could not be measured.
    """

    findings: tuple[Finding, ...]
    experts: tuple[ExpertFacts, ...]
    pairs: tuple[Pair, ...]
    rows_looked_at: str
    shares_basis: bool | None = None
    rank: int | None = None
    vllm_max_lora_rank: int | None = None
    pile: Pile | None = None

    @property
    def has_errors(self) -> bool:
        """Whether an error prevents a merge of these experts."""
        return any(finding.severity == "error" for finding in self.findings)

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """Return the findings of one kind."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def as_json(self) -> Mapping[str, Any]:
        """Return the diagnosis as one JSON object."""
        return {"errors": self.has_errors, **asdict(self)}
