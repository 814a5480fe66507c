"""`diagnose` checks experts before a merge. It reports the errors that prevent the merge, and warnings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.compatible import disagreements, other_adapters, other_names, other_shapes
from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import InputError, SoupError
from personalized_soups.files.digest import digest_file
from personalized_soups.merging.computing.changes import Changes
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.doctor.diagnosis import Diagnosis, ExpertFacts, Finding, Pair
from personalized_soups.merging.doctor.measured_experts import MeasuredExperts
from personalized_soups.merging.doctor.measures import Measures, base_norms
from personalized_soups.merging.doctor.rules import rule_findings
from personalized_soups.merging.planning.checks import faults_of, unmet_needs
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.planner import plan_merge
from personalized_soups.merging.planning.vllm import vllm_max_lora_rank
from personalized_soups.methods.plugins import find_method

Progress = Callable[[int, int], None]

_SEVERITIES = ("error", "warning", "note")
_MAX_SHOWN = 8


def diagnose(
    experts: ExpertLibrary | Sequence[Expert],
    base: Path | str | None = None,
    *,
    profile: Profile | None = None,
    same_base: bool = False,
    num_rows: int = 64,
    progress: Progress | None = None,
) -> Diagnosis:
    """Check experts against each other and against their base, and measure the angles between their deltas.

    The result contains all errors, not only the first. No file is written. The magnitudes of DoRA and the tensors that
    an expert trained whole are checked, but not measured. One module of all experts is in memory at a time.

    Args:
        experts: a library, or experts of different names.
        base: the base model: a folder, or a hub id in the local cache. If it is None, the experts are not checked
            against their base.
        profile: the weights of some of the experts. If it is given, their soup is checked too.
        same_base: whether to accept experts that name different bases, or a base whose fingerprint differs from theirs.
        num_rows: the number of rows of each module in which opposite signs are counted. In a module with fewer rows,
            all rows are used.
        progress: a function that is called with the number of modules that have been read and the number of all
            modules.

    Raises:
        DeclarationError: if the profile names an unknown expert.
        InputError: if the base is missing or damaged.
        UnsupportedAdapterError: if the base is quantized.

    Example:
        >>> diagnose(ExpertLibrary.open("experts")).has_errors
        False
    """
    library = experts if isinstance(experts, ExpertLibrary) else _as_library(experts)
    if profile is not None:
        library.check(profile)
    model = None if base is None else BaseModel.open(base)
    examination = _Examination(library, profile, model, same_base)
    return examination.run(num_rows, progress)


@dataclass(eq=False, slots=True)
class _Examination:
    """The checks of one library. `run` collects their findings and returns the diagnosis."""

    library: ExpertLibrary
    profile: Profile | None
    model: BaseModel | None
    same_base: bool
    findings: list[Finding] = field(default_factory=list)

    def run(self, num_rows: int, progress: Progress | None) -> Diagnosis:
        sound = list(self._sound())
        names = {fault.what for fault in other_names(sound)}
        kinds = {fault.what: "shape" for fault in other_shapes(sound)}
        kinds |= {fault.what: "base adapter" for fault in other_adapters(sound)}
        kinds |= dict.fromkeys(names, "names")
        for fault in disagreements(sound, same_base=self.same_base):
            self._error(kinds.get(fault.what, "base"), fault)
        self._check_base(sound)
        self._check_profile(sound)
        bank = ExpertBank(sound)
        measures = Measures.of(bank, num_rows, progress)
        self._check_finite(bank, measures)
        measured = self._measured(bank, measures)
        self.findings += rule_findings(measured)
        fits = bool(measured.chosen) and not any(finding.kind in {"shape", "names"} for finding in self.findings)
        rank = _stacked_rank(measured) if fits else None
        if rank is not None:
            self.findings.append(_rank_finding(rank))
        findings = sorted(self.findings, key=lambda finding: _SEVERITIES.index(finding.severity))
        return Diagnosis(
            findings=tuple(findings),
            experts=tuple(_facts(measured, index) for index in range(len(sound))),
            pairs=tuple(_pair(measured, first, second) for first, second in combinations(range(len(sound)), 2)),
            rows_looked_at=_rows_looked_at(bank, num_rows),
            shares_basis=None if rank is None else measured.shares_basis,
            rank=rank,
            vllm_max_lora_rank=None if rank is None else vllm_max_lora_rank(rank),
            pile=measured.pile,
        )

    def _sound(self) -> Iterator[Expert]:
        for expert in self.library.values():
            faults = faults_of(expert)
            for fault in faults:
                self._error("expert", fault, of=expert)
            if not faults:
                yield expert

    def _check_base(self, experts: Sequence[Expert]) -> None:
        """Check each expert separately, so that an error of one expert does not hide the errors of another."""
        if self.model is None:
            return
        for expert in experts:
            try:
                if not self.same_base:
                    self.model.check_fingerprints([expert])
            except SoupError as fault:
                self._error("other base", fault, of=expert)
            try:
                alone = ExpertLibrary({expert.name: expert.folder}, where=str(expert.folder))
                plan = plan_merge(
                    alone, Profile(weights={expert.name: 1.0}), MergeOptions(same_base=True), into_base=True
                )
                Changes.of(Soups([plan], ExpertBank([expert])), self.model)
            except SoupError as fault:
                self._error("base module", fault, of=expert)

    def _check_profile(self, experts: Sequence[Expert]) -> None:
        if self.profile is None:
            return
        weights = {name: weight for name, weight in self.profile.resolved_weights().items() if weight != 0}
        chosen = [expert for expert in experts if expert.name in weights]
        try:
            SideRule.of(chosen).check(self.profile)
        except SoupError as fault:
            self._error("opposed sides", fault)
        try:
            method = find_method(self.profile.method)
        except SoupError as fault:
            self._error("method", fault)
            return
        for need in unmet_needs(method, ExpertBank(chosen), [weights[expert.name] for expert in chosen]):
            self._error("method", need)

    def _check_finite(self, bank: ExpertBank, measures: Measures) -> None:
        for index, faults in measures.faults.items():
            names = [fault.what.partition(":")[0] for fault in faults[1:]]
            more = f" (and in {', '.join(names[:_MAX_SHOWN])}{', ...' if len(names) > _MAX_SHOWN else ''})"
            what = faults[0].what + (more if names else "")
            error = InputError(what, where=faults[0].where, mend=faults[0].mend)
            self._error("not finite", error, of=bank.experts[index])

    def _measured(self, bank: ExpertBank, measures: Measures) -> MeasuredExperts:
        weights: Mapping[str, float] = {} if self.profile is None else self.profile.resolved_weights()
        norms = None
        if self.model is not None:
            targets = {module.base_name for expert in bank.experts for module in expert.adapter.modules.values()}
            norms = base_norms(self.model, sorted(targets))
        return MeasuredExperts(
            bank=bank,
            measures=measures,
            weights=None if self.profile is None else tuple(weights.get(expert.name, 0.0) for expert in bank.experts),
            dimensions=SideRule.of(bank.experts).dimension_of,
            base_norms=norms,
            duplicates=frozenset(_duplicates(bank, measures)),
        )

    def _error(self, kind: str, fault: SoupError, of: Expert | None = None) -> None:
        what = fault.what if of is None or of.name in fault.what else f"{of.name}: {fault.what}"
        self.findings.append(Finding("error", kind, what, fault.where, fault.mend))


def _as_library(experts: Sequence[Expert]) -> ExpertLibrary:
    return ExpertLibrary({expert.name: expert.folder for expert in experts}, where="the experts")


def _duplicates(bank: ExpertBank, measures: Measures) -> Iterator[tuple[int, int]]:
    """Yield each pair of experts whose weight files are equal byte for byte."""
    digests: dict[int, tuple[str, ...]] = {}
    for first, second in combinations(range(len(bank.experts)), 2):
        sizes = {bank.experts[index].adapter.num_bytes for index in (first, second)}
        cosine = measures.cosine(first, second)
        # Hashing is slow, so only likely duplicates are hashed. The cosine is None if an expert is zero or not finite.
        if len(sizes) > 1 or (cosine is not None and cosine < 1 - 1e-6):
            continue
        for index in (first, second):
            if index not in digests:
                adapter = bank.experts[index].adapter
                digests[index] = tuple(digest_file(path) for path in adapter.files if path != adapter.config.path)
        if digests[first] == digests[second]:
            yield first, second


def _stacked_rank(measured: MeasuredExperts) -> int:
    chosen = ExpertBank([measured.bank.experts[index] for index in measured.chosen])
    return max(map(chosen.stacked_rank, chosen.modules))


def _rank_finding(rank: int) -> Finding:
    what = f"the adapter file of the exact soup has rank {rank}"
    most = vllm_max_lora_rank(rank)
    if most is None:
        return Finding(
            "warning", "rank of the merge", f"{what}, which is more than vLLM can load", "vLLM", "merge with rank 64"
        )
    mend = f"start vLLM with --max-lora-rank {most}, or merge with a smaller rank"
    return Finding("note", "rank of the merge", what, "vLLM", mend)


def _rows_looked_at(bank: ExpertBank, num_rows: int) -> str:
    modules = [module for expert in bank.experts for module in expert.adapter.modules.values()]
    most = max((module.out_features for module in modules), default=0)
    return "all rows" if most <= num_rows else f"{num_rows} rows of each module, drawn with seed 0"


def _facts(measured: MeasuredExperts, index: int) -> ExpertFacts:
    expert = measured.bank.experts[index]
    modules = expert.adapter.modules.values()
    return ExpertFacts(
        name=expert.name,
        folder=str(expert.folder),
        dimension=measured.dimensions.get(expert.name),
        rank=_span([module.rank for module in modules]),
        scaling=_span([module.scaling for module in modules]),
        num_modules=len(expert.adapter.modules),
        dtype=", ".join(sorted(expert.adapter.dtypes)),
        norm=None if index in measured.measures.faults else measured.measures.norm(index),
        relative=measured.relative(index),
        weight=None if measured.weights is None else measured.weights[index],
    )


def _pair(measured: MeasuredExperts, first: int, second: int) -> Pair:
    measures = measured.measures
    return Pair(
        one=measured.name(first),
        other=measured.name(second),
        cosine=measures.cosine(first, second),
        inputs=measures.inputs(first, second),
        outputs=measures.outputs(first, second),
        opposed=measures.opposed(first, second),
    )


def _span(values: Sequence[float]) -> str:
    low, high = min(values, default=math.nan), max(values, default=math.nan)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
