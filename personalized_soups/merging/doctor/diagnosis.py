"""What is found of experts before they are merged: findings, one by one, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. An error stops a merge, a warning will surprise, a note explains.

    `kind` is one word or two that programs can go by.
    """

    severity: Severity
    kind: str
    what: str
    where: str
    mend: str


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """One expert whose files are sound.

    `norm` is the Frobenius norm of its low-rank changes over all modules, `relative` that over the norm of the base's
    tensors which they change; `weight` is the profile's.
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
    """How two experts' low-rank changes lie to one another; None where they have no module in common, or one is 0.

    Args:
        one: the first expert's name.
        other: the second's.
        cosine: of the angle between their deltas, all modules taken as one vector.
        inputs: the mean squared cosine of the principal angles between the row spaces of their A's.
        outputs: the same of the column spaces of their B's.
        opposed: the share of their energies in entries where their signs differ, the mean of both experts' shares.
    """

    one: str
    other: str
    cosine: float | None
    inputs: float | None
    outputs: float | None
    opposed: float | None


@dataclass(frozen=True, slots=True)
class Pile:
    """What a profile's experts add up to: `|sum w d|`, beside its value if they were orthogonal, and its most."""

    norm: float
    orthogonal: float
    most: float


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All that is known of experts before they are merged.

    `rows_looked_at` says how the signs were counted: in all rows of every module, or in how many of each; `rank` is
    that of their stacked merge, `vllm_max_lora_rank` the smallest with which vLLM loads it. Both are None where the
    experts do not fit together.
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
        """Whether anything stops a merge of these experts."""
        return any(finding.severity == "error" for finding in self.findings)

    def of_kind(self, kind: str) -> tuple[Finding, ...]:
        """Return the findings of one kind."""
        return tuple(finding for finding in self.findings if finding.kind == kind)

    def as_json(self) -> Mapping[str, Any]:
        """Return everything as one JSON object."""
        return {"errors": self.has_errors, **asdict(self)}
