"""The results of the doctor: its findings about experts, and the measurements that the findings come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding about experts.

    Attributes:
        severity: `error` if the experts cannot be merged, `warning` if the soup may not behave as expected, `note`
            otherwise.
        kind: the name of the rule. Names do not change, so programs can compare them.
        what: one sentence that describes the finding with the measured values.
        where: the experts, tensors or files that the finding is about.
        mend: the action to take.
    """

    severity: Severity
    kind: str
    what: str
    where: str
    mend: str


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """Facts about an expert whose files are valid.

    Attributes:
        name: the expert's name.
        folder: the expert's folder.
        dimension: the preference dimension of the expert's side. None if it is unknown.
        rank: the rank of the expert's modules, such as `4`. If the ranks differ, the lowest and the highest, such as
            `2 to 8`.
        scaling: the scaling of the expert's modules. If the scalings differ, the lowest and the highest.
        num_modules: the number of modules that the expert adapts.
        dtype: the dtypes of the expert's tensors, as named in the adapter file.
        norm: the Frobenius norm of the expert's low-rank deltas, with all modules as one vector. None if the expert
            contains NaN or infinity.
        relative: `norm` divided by the norm of the base tensors that the expert changes. None without a base.
        weight: the expert's weight in the profile. None without a profile.
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
    """Measurements of the low-rank deltas of two experts.

    A measurement is None if the experts have no module in common, or if one of the deltas is 0.

    Attributes:
        one: the first expert's name.
        other: the second expert's name.
        cosine: the cosine of the angle between the two deltas, with all modules as one vector.
        inputs: the mean squared cosine of the principal angles between the row spaces of the A's.
        outputs: the mean squared cosine of the principal angles between the column spaces of the B's.
        opposed: the share of the squared norm that is in entries where the signs of the deltas differ. It is the mean
            of the two experts' shares.
    """

    one: str
    other: str
    cosine: float | None
    inputs: float | None
    outputs: float | None
    opposed: float | None


@dataclass(frozen=True, slots=True)
class Pile:
    """The Frobenius norm of a profile's weighted sum of deltas, and two norms to compare it with.

    In the formulas, w is an expert's weight and d is its delta.

    Attributes:
        norm: `|sum w d|`, the norm of the weighted sum.
        orthogonal: `sqrt(sum |w d|^2)`, the norm that the weighted sum would have if the experts were orthogonal.
        most: `sum |w d|`, the norm that the weighted sum would have if all weighted experts had the same direction.
    """

    norm: float
    orthogonal: float
    most: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of `diagnose`.

    Attributes:
        findings: all findings, errors first.
        experts: facts about each expert whose files are valid.
        pairs: the measurements of each pair of these experts.
        rows_looked_at: a description of the rows in which opposite signs were counted.
        shares_basis: whether the experts have the same A in every module. None if they cannot be merged with each
            other.
        rank: the rank of the adapter file of the experts' exact soup. None if they cannot be merged with each other.
        vllm_max_lora_rank: the smallest value of --max-lora-rank with which vLLM loads that adapter. None if there is
            no such value.
        pile: the norms of the profile's weighted sum. None without a profile, or if an expert could not be measured.
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
        """Whether a finding is an error, so that the experts cannot be merged."""
        return any(finding.severity == "error" for finding in self.findings)

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """Return the findings of the rule named `kind`."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def as_json(self) -> Mapping[str, Any]:
        """Return the diagnosis as one JSON object."""
        return {"errors": self.has_errors, **asdict(self)}
