"""What a merge will do, decided from headers alone; every fault that can be known before is found here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from personalized_soups.adapters.compatible import disagreements
from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.adapters.provenance import BaseRecord
from personalized_soups.bank import ExpertBank
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.profile import Profile, check_sides
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import IncompatibleExpertsError, InputError, SoupError, UsageError, choose_from
from personalized_soups.methods.factors import cancels
from personalized_soups.methods.table import Method, method_named

DtypeName = Literal["float32", "bfloat16", "float16"]
PlannedEncoding = Literal["stacked", "truncated", "folded"]

# The values that vLLM's --max-lora-rank can have (vllm/config/lora.py, 0.32).
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_CHOICES: Mapping[str, DtypeName] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_OF_FILES: Mapping[str, DtypeName] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class PlannedExpert:
    """One expert that takes part, and the weight with which it enters the method."""

    name: str
    folder: str
    weight: float


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One linear layer: `full_rank` is what the method gives, `rank` what is left after truncation."""

    name: str
    out_features: int
    in_features: int
    experts: tuple[str, ...]
    full_rank: int
    rank: int


@dataclass(frozen=True, slots=True)
class MergePlan:
    """The frozen list of what a merge will do. It holds no tensor; `lines()` prints it."""

    profile: Profile
    method: Method
    encoding: PlannedEncoding
    experts: tuple[PlannedExpert, ...]
    modules: tuple[PlannedModule, ...]
    rank: int
    dtype: DtypeName
    base: BaseRecord
    revision: str | None
    task_type: str | None
    target_modules: tuple[str, ...]
    shares_basis: bool

    @property
    def weights(self) -> tuple[float, ...]:
        """The experts' weights, in their order."""
        return tuple(expert.weight for expert in self.experts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the merged adapter's tensors."""
        numbers = sum(self.rank * (module.in_features + module.out_features) for module in self.modules)
        return numbers * torch_dtype(self.dtype).itemsize

    @property
    def vllm_max_lora_rank(self) -> int | None:
        """The smallest --max-lora-rank with which vLLM loads the merged adapter; None where none is large enough."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), None)

    def lines(self) -> list[str]:
        """Return the plan as lines for people."""
        experts = " + ".join(f"{expert.weight:g} {expert.name}" for expert in self.experts)
        basis = ", one shared basis" if self.shares_basis else ""
        held = f"rank {self.rank}, {self.num_bytes} bytes of {self.dtype}"
        lines = [
            f"soup:     {experts}",
            f"method:   {self.method.name}: {self.method.formula}",
            f"encoding: {self.encoding}{basis}" + ("" if self.encoding == "folded" else f", {held}"),
            f"base:     {self.base.name or 'not named'}",
            f"modules:  {len(self.modules)}",
        ]
        if self.encoding != "folded":
            most = self.vllm_max_lora_rank or f"(none: rank {self.rank} is above {VLLM_RANKS[-1]})"
            lines.append(f"vLLM:     --max-lora-rank {most}")
        return lines


def plan_merge(
    library: ExpertLibrary,
    profile: Profile,
    *,
    method: str | Method | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    same_base: bool = False,
    into_base: bool = False,
) -> MergePlan:
    """Return what merging `profile` will do; no tensor is read but the first bytes of the A's.

    Args:
        library: where the experts are.
        profile: who the soup is for; experts of weight 0 take no part.
        method: overrides the profile's; a name, or a row of a stranger's own.
        rank: overrides the profile's: the merged adapter has at most this rank.
        dtype: of the merged adapter; where left out, the experts' own if they agree, else float32.
        same_base: take it that all experts have one base, whatever their names and fingerprints say.
        into_base: plan to fold the soup into a base model, where rank and dtype are the base's.

    Raises:
        DeclarationError: if the profile names unknown experts, or opposed sides.
        IncompatibleExpertsError: if the experts disagree with one another or with what the method needs.
        InputError: if an expert is damaged or of a variant that is not merged.
        UsageError: if an option is out of place. All faults of one kind of step are told at once.
    """
    row = method_named(method or profile.method) if not isinstance(method, Method) else method
    asked_rank = _checked_rank(profile, rank, into_base=into_base)
    _check_dtype(dtype, into_base=into_base)
    library.check(profile)
    chosen = [(library[name], weight) for name, weight in profile.resolved_weights().items() if weight != 0]
    experts = [expert for expert, _ in chosen]
    # nothing can be compared before each expert is sound by itself
    _raise_all([fault for expert in experts for fault in _faults_of(expert)])
    bank = ExpertBank(experts)
    check_sides(
        profile, _dimensions(experts), {expert.name: expert.side for expert in experts if expert.side is not None}
    )
    _raise_all([*disagreements(experts, same_base=same_base), *_unmet_needs(row, bank, [w for _, w in chosen])])
    modules = tuple(_planned(bank, name, row, asked_rank) for name in bank.modules)
    truncated = any(module.rank < module.full_rank for module in modules)
    encoding: PlannedEncoding = "folded" if into_base else "truncated" if truncated else "stacked"
    if encoding not in row.encodings:
        raise UsageError(
            f"a soup by {row.name} cannot be held {encoding}", where="method", mend=f"choose {', '.join(row.encodings)}"
        )
    return MergePlan(
        profile=profile,
        method=row,
        encoding=encoding,
        experts=tuple(PlannedExpert(expert.name, str(expert.folder.resolve()), weight) for expert, weight in chosen),
        modules=modules,
        rank=max(module.rank for module in modules),
        dtype=_resolved_dtype(dtype, experts),
        base=_common_base(experts),
        revision=_agreed([expert.adapter.config.revision for expert in experts]),
        task_type=_agreed([expert.adapter.config.task_type for expert in experts]),
        target_modules=_targets(experts, bank.modules),
        shares_basis=bank.shares_basis,
    )


def torch_dtype(name: DtypeName) -> torch.dtype:
    """Return torch's dtype of that name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def resolve_device(device: str) -> torch.device:
    """Return the device for a merge: `auto` is the CPU, since a merge waits for files rather than for arithmetic.

    Raises:
        UsageError: if the device is unknown or not here.
    """
    if device == "auto":
        return torch.device("cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"unknown device {device!r}", where="--device", mend="choose from: auto, cpu, cuda, cuda:N")
    kind, _, index = device.partition(":")
    # compared as a number of any length: torch keeps an index in eight bits
    if kind == "cuda" and int(index[:9] or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {device!r} on this machine", where="--device", mend="leave --device out, or take cpu"
        )
    return torch.device(device)


def _checked_rank(profile: Profile, option: int | None, *, into_base: bool) -> int | None:
    rank, where = (profile.rank, profile.place("rank")) if option is None else (option, "--rank")
    if rank is None:
        return None
    if rank < 1:
        raise UsageError(f"the rank is {rank}, it must be at least 1", where=where, mend="give --rank 16")
    if into_base:
        raise UsageError(
            "a soup folded into a base is exact and has no rank",
            where=where,
            mend="leave the rank out, or write an adapter instead",
        )
    return rank


def _check_dtype(dtype: str | None, *, into_base: bool) -> None:
    if dtype is None:
        return
    if into_base:
        raise UsageError("a folded model keeps its base's dtypes", where="--dtype", mend="leave --dtype out")
    if dtype not in _CHOICES:
        raise UsageError(f"unknown dtype {dtype!r}", where="--dtype", mend=choose_from(dtype, _CHOICES))


def _faults_of(expert: Expert) -> list[SoupError]:
    """Return what is wrong with an expert by itself: its adapter and its record."""
    steps: tuple[Callable[[], object], ...] = (lambda: expert.adapter, lambda: expert.record)
    found: list[SoupError] = []
    for step in steps:
        try:
            step()
        except SoupError as fault:
            found.append(fault)
    return found


def _raise_all(faults: Sequence[SoupError]) -> None:
    """Raise the only fault, or one error that tells all of them."""
    if not faults:
        return
    if len(faults) == 1:
        raise faults[0]
    kind = type(faults[0]) if len({type(fault) for fault in faults}) == 1 else InputError
    raise kind(
        f"{len(faults)} faults: " + "; ".join(f"({number}) {fault.what}" for number, fault in enumerate(faults, 1)),
        where="; ".join(f"({number}) {fault.where}" for number, fault in enumerate(faults, 1)),
        mend="; ".join(f"({number}) {fault.mend}" for number, fault in enumerate(faults, 1)),
    )


def _unmet_needs(method: Method, bank: ExpertBank, weights: Sequence[float]) -> list[SoupError]:
    found: list[SoupError] = []
    if method.needs_equal_ranks:
        found += _unequal(method, bank, "rank", lambda expert, name: expert.adapter.modules[name].rank)
    if method.needs_equal_scalings:
        found += _unequal(method, bank, "scaling", lambda expert, name: expert.adapter.modules[name].scaling)
    if method.divides_by_sum and cancels(weights):
        found.append(
            UsageError(
                f"{method.name} divides by the sum of the weights, which is {sum(weights):g}",
                where="weights",
                mend="take the method `linear`, or weights that do not cancel",
            )
        )
    return found


def _unequal(method: Method, bank: ExpertBank, what: str, of: Callable[[Expert, str], float]) -> list[SoupError]:
    found = []
    for name in bank.modules:
        values = {bank.experts[index].name: of(bank.experts[index], name) for index in bank.members(name)}
        if len(set(values.values())) > 1:
            found.append(f"{name}: " + ", ".join(f"{expert} has {value:g}" for expert, value in values.items()))
    if not found:
        return []
    more = f" (and {len(found) - _MAX_SHOWN} more modules)" if len(found) > _MAX_SHOWN else ""
    return [
        IncompatibleExpertsError(
            f"{method.name} needs one {what} for all experts: " + "; ".join(found[:_MAX_SHOWN]) + more,
            where=", ".join(expert.name for expert in bank.experts),
            mend="take the method `linear`, which merges any ranks and scalings",
        )
    ]


def _planned(bank: ExpertBank, name: str, method: Method, rank: int | None) -> PlannedModule:
    members = bank.members(name)
    described = [bank.experts[index].adapter.modules[name] for index in members]
    if method.family == "linear":
        # one A for several experts takes its rows once
        full = sum({number: each.rank for number, each in zip(bank.basis(name), described, strict=True)}.values())
    else:
        full = described[0].rank
    return PlannedModule(
        name=name,
        out_features=described[0].out_features,
        in_features=described[0].in_features,
        experts=tuple(bank.experts[index].name for index in members),
        full_rank=full,
        rank=full if rank is None else min(rank, full),
    )


def _dimensions(experts: Sequence[Expert]) -> dict[str, str]:
    """Return the dimension of each expert that has one: by expert.json, else by a name of the shipped catalogue."""
    found = {}
    for expert in experts:
        if expert.dimension is not None:
            found[expert.name] = expert.dimension
        elif len(experts) > 1 and (dimension := _catalogue().dimension_of(expert.side or expert.name)) is not None:
            found[expert.name] = dimension
    return found


@cache
def _catalogue() -> Catalogue:
    return load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)


def _resolved_dtype(dtype: str | None, experts: Sequence[Expert]) -> DtypeName:
    if dtype is not None:
        return _CHOICES[dtype]
    own = {name for expert in experts for name in expert.adapter.dtypes}
    return _OF_FILES.get(own.pop(), "float32") if len(own) == 1 else "float32"


def _common_base(experts: Sequence[Expert]) -> BaseRecord:
    """Return the first expert's name for the base, and the first fingerprint that an expert records."""
    bases = [expert.base for expert in experts]
    return BaseRecord(
        name=next((base.name for base in bases if base.name), None),
        fingerprint=next((base.fingerprint for base in bases if base.fingerprint), None),
    )


def _agreed(values: Sequence[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def _targets(experts: Sequence[Expert], modules: Sequence[str]) -> tuple[str, ...]:
    """Return `target_modules` that match the adapted modules of the base and no others.

    Where every expert lists its targets, the union of the lists matches the union of the modules; where one gives a
    regular expression, or leaves out layers, the modules' full names do.
    """
    listed: set[str] = set()
    for expert in experts:
        targets = expert.adapter.config.target_modules
        if targets is None:
            return tuple(sorted(modules))
        listed.update(targets)
    return tuple(sorted(listed))
