"""Plan a merge: check the experts and the options, and make all decisions that need only the files' headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.compatible import disagreements
from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.provenance import BaseRecord
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.devices import DtypeName
from personalized_soups.errors import UsageError, choose_from
from personalized_soups.merging.planning.base_adapter import checked_rank, open_base_adapter
from personalized_soups.merging.planning.checks import Cut, checked_cut, faults_of, raise_all, unmet_needs
from personalized_soups.merging.planning.layout import conflicts, layout_of, missing_base, named_modules
from personalized_soups.merging.planning.method_source import method_source
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import MergePlan, PlannedEncoding, PlannedExpert, PlannedModule, Target
from personalized_soups.merging.planning.vllm import check_vllm_rank, unfit_for_vllm
from personalized_soups.methods.method import Method
from personalized_soups.methods.plugins import find_method

_TARGETS: Mapping[str, Target] = {"peft": "peft", "vllm": "vllm"}
_CHOICES: Mapping[str, DtypeName] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_OF_FILES: Mapping[str, DtypeName] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def plan_merge(
    library: ExpertLibrary, profile: Profile, options: MergeOptions | None = None, *, into_base: bool = False
) -> MergePlan:
    """Return the plan for the soup of `profile`.

    The plan is made from the headers of the experts' files. Of the experts' tensors, only the A's are read, to find
    experts that share their A's. If one step of the checks finds several errors, one exception reports them all.

    Args:
        library: the experts.
        profile: the user's weights. Experts with weight 0 are left out.
        options: the choices that override those of the profile. The default is `MergeOptions()`.
        into_base: plan to fold the soup into a base model. The soup is then not truncated and has the base's dtypes.

    Raises:
        DeclarationError: if the profile names an unknown expert, or experts of two sides of one dimension.
        IncompatibleExpertsError: if the experts do not fit each other or the merge method.
        InputError: if a file of an expert is damaged, or an expert is a variant of LoRA that cannot be merged.
        UsageError: if an option is invalid, if an adapter cannot hold the soup, or if the soup needs a base model and
            none is given.
    """
    options = options or MergeOptions()
    method = find_method(profile.method if options.method is None else options.method)
    method_options = _method_options(method, profile, options.method_options)
    cut = checked_cut(profile, options.rank, options.energy, into_base=into_base)
    _check_dtype(options.dtype, into_base=into_base)
    _check_base(options.base, into_base=into_base)
    library.check(profile)
    # sorted by name, so that a soup's bytes do not depend on the order of the profile's weights
    chosen = [(library[name], weight) for name, weight in sorted(profile.resolved_weights().items()) if weight != 0]
    experts = [expert for expert, _ in chosen]
    # the experts are compared with each other only if the files of each expert can be read
    raise_all([fault for expert in experts for fault in faults_of(expert)])
    bank = ExpertBank(experts)
    SideRule.of(experts).check(profile)
    raise_all(
        [
            *disagreements(experts, same_base=options.same_base),
            *unmet_needs(method, bank, [weight for _, weight in chosen]),
        ]
    )
    on = open_base_adapter(options, experts)
    # the base adapter's tensors are written like those of an expert
    sources = experts if on is None else [*experts, on.expert]
    target = _checked_target(options.target, into_base=into_base)
    layout = layout_of(sources)
    unfit = unfit_for_vllm(sources)
    if not into_base:
        raise_all(unfit if target == "vllm" else [])
        raise_all([*conflicts(sources, layout), *(missing_base(experts) if options.base is None else [])])
    modules = tuple(_planned(bank, like, method, cut.rank, on) for like in named_modules(sources, layout))
    rank = max(module.written_rank for module in modules)
    if target == "vllm" and options.energy is None:
        check_vllm_rank(rank)
    base, base_folder = _read_base(options.base, experts, same_base=options.same_base)
    return MergePlan(
        profile=profile,
        method=method,
        method_source=method_source(method),
        options=method_options,
        target=target,
        fits_vllm=not unfit,
        energy=cut.energy,
        encoding=_encoding(method, modules, cut, into_base=into_base),
        experts=tuple(PlannedExpert(expert.name, str(expert.folder.resolve()), weight) for expert, weight in chosen),
        modules=modules,
        rank=rank,
        dtype=_resolved_dtype(options.dtype, sources),
        base=base,
        base_folder=base_folder,
        revision=_agreed([expert.adapter.config.revision for expert in experts]),
        task_type=_agreed([expert.adapter.config.task_type for expert in experts]),
        layout=layout,
        shares_basis=bank.shares_basis,
        on=on.record if on is not None else next((expert.on for expert in experts if expert.on is not None), None),
        on_folder=None if on is None else str(on.folder.resolve()),
    )


def _check_dtype(dtype: str | None, *, into_base: bool) -> None:
    if dtype is None:
        return
    if into_base:
        raise UsageError(
            "a dtype is given, but a folded model keeps its base's dtypes",
            where="dtype",
            mend=f"leave out dtype={dtype}",
        )
    if dtype not in _CHOICES:
        raise UsageError(f"the dtype {dtype!r} is unknown", where="dtype", mend=choose_from(dtype, _CHOICES))


def _check_base(base: Path | str | None, *, into_base: bool) -> None:
    if into_base and base is not None:
        raise UsageError(
            "base is only for merged adapters, but this soup is folded into a base model (into_base)",
            where="base",
            mend="leave out base",
        )


def _checked_target(target: str, *, into_base: bool) -> Target:
    if target not in _TARGETS:
        raise UsageError(f"the target {target!r} is unknown", where="target", mend=choose_from(target, _TARGETS))
    if into_base and target != "peft":
        raise UsageError(
            f"target={target} is only for merged adapters, but this soup is folded into a full model",
            where="target",
            mend=f"leave out target={target}, because {target} can load a full model without it",
        )
    return _TARGETS[target]


def _method_options(method: Method, profile: Profile, given: Mapping[str, float] | None) -> Mapping[str, float]:
    """Return the options of the merge method. The caller's values override the profile's values.

    If the caller chooses another method than the profile, options of the profile that this method lacks are ignored.
    """
    is_own = method.name == profile.method
    own = {name: value for name, value in profile.options.items() if is_own or name in method.options}
    try:
        return method.resolved({**own, **(given or {})})
    except UsageError as fault:
        is_in_profile = fault.where in own and fault.where not in (given or {})
        place = profile.place("options", fault.where) if is_in_profile else fault.where
        raise UsageError(fault.what, where=place, mend=fault.mend) from None


def _encoding(method: Method, modules: Sequence[PlannedModule], cut: Cut, *, into_base: bool) -> PlannedEncoding:
    """Return the encoding of the soup, and check that the merge method supports this encoding."""
    if into_base:
        encoding: PlannedEncoding = "folded"
    elif cut.energy is not None or any(module.rank < module.full_rank for module in modules):
        encoding = "truncated"
    elif method.family == "dense":
        # a dense delta becomes factors only by a decomposition, even at its full rank
        encoding = "truncated" if cut.is_asked_for else "stacked"
    else:
        encoding = "stacked"
    if encoding not in method.encodings:
        raise UsageError(
            f"the method {method.name} returns deltas of full rank, but an adapter needs a lower rank"
            if method.family == "dense"
            else f"a soup of the method {method.name} cannot be written in the encoding {encoding}",
            where="method",
            mend="give rank=16 or energy=0.99, fold the soup into the base (into_base=BASE), or use method=linear",
        )
    return encoding


def _planned(
    bank: ExpertBank, like: LoraModule, method: Method, rank: int | None, on: BaseAdapter | None
) -> PlannedModule:
    """Return the plan of one module, with the soup's ranks before and after truncation.

    The soup and the base adapter together have at most the rank `rank`. The base adapter is not truncated.
    """
    members = bank.members(like.name)
    on_rank = 0 if on is None or like.name not in on.adapter.modules else on.adapter.modules[like.name].rank
    if not members:
        return PlannedModule(like, experts=(), full_rank=0, rank=0, on_rank=on_rank)
    if rank is not None:
        rank = checked_rank(rank - on_rank, like.name, on_rank)
    described = [bank.experts[index].adapter.modules[like.name] for index in members]
    if method.family == "dense":
        full = min(like.out_features, like.in_features)
    elif method.needs_equal_ranks:
        full = described[0].rank
    elif method.family == "linear":
        full = bank.stacked_rank(like.name)
    else:
        full = sum(each.rank for each in described)
    return PlannedModule(
        like=like,
        experts=tuple(bank.experts[index].name for index in members),
        full_rank=full,
        rank=full if rank is None else min(rank, full),
        on_rank=on_rank,
    )


def _resolved_dtype(dtype: str | None, experts: Sequence[Expert]) -> DtypeName:
    """Return `dtype` if it is given. Otherwise return the experts' common dtype, or float32 if the dtypes differ."""
    if dtype is not None:
        return _CHOICES[dtype]
    own = {name for expert in experts for name in expert.adapter.dtypes}
    return _OF_FILES.get(own.pop(), "float32") if len(own) == 1 else "float32"


def _common_base(experts: Sequence[Expert]) -> BaseRecord:
    """Return the first name and the first fingerprint of the base that the experts record."""
    bases = [expert.base for expert in experts]
    return BaseRecord(
        name=next((base.name for base in bases if base.name), None),
        fingerprint=next((base.fingerprint for base in bases if base.fingerprint), None),
    )


def _read_base(base: Path | str | None, experts: Sequence[Expert], *, same_base: bool) -> tuple[BaseRecord, str | None]:
    """Return the base's name and fingerprint, and the base's folder if a base is given.

    Raises:
        IncompatibleExpertsError: if `same_base` is false and an expert records another fingerprint than the base's.
    """
    named = _common_base(experts)
    if base is None:
        return named, None
    model = BaseModel.open(base)
    if not same_base:
        model.check_fingerprints(list(experts))
    return BaseRecord(name=named.name, fingerprint=model.fingerprint), str(model.folder.resolve())


def _agreed(values: Sequence[str | None]) -> str | None:
    """Return the common value, or None if the values differ."""
    return values[0] if len(set(values)) == 1 else None
