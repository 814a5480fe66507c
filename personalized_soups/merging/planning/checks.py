"""Checks before a merge: whether the experts' files are readable, the options valid, and the experts fit the method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from personalized_soups.adapters.library import Expert
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import (
    IncompatibleExpertsError,
    InputError,
    SoupError,
    UnsupportedAdapterError,
    UsageError,
)
from personalized_soups.merging.planning.plan import MergePlan
from personalized_soups.methods.factors import cancels
from personalized_soups.methods.method import Method

_MAX_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Cut:
    """The truncation that is requested. At most one of `rank` and `energy` is given.

    Attributes:
        rank: the maximum rank; None if the rank is not limited.
        energy: the share of each module's squared Frobenius norm to keep; None if no share is given.
        where: the argument, or the line of the profile, that requests the truncation. Errors show it.
    """

    rank: int | None = None
    energy: float | None = None
    where: str = ""

    @property
    def is_asked_for(self) -> bool:
        """Whether truncation is requested."""
        return self.rank is not None or self.energy is not None


def checked_cut(profile: Profile, rank: int | None, energy: float | None, *, into_base: bool) -> Cut:
    """Check the truncation that is requested and return it.

    A rank or an energy in the arguments overrides the rank of the profile.

    Raises:
        UsageError: if the value is out of bounds, if a rank and an energy are both given, or if the soup is folded into
            a base, which needs no truncation.
    """
    if rank is not None and energy is not None:
        raise UsageError(
            "rank and energy are both given, but only one of them can limit the truncation",
            where="rank, energy",
            mend="give one of the two, for example rank=16",
        )
    if energy is not None:
        cut = Cut(energy=energy, where="energy")
        if not 0 < energy <= 1:
            raise UsageError(
                f"energy is {energy:g}, but it must be above 0 and at most 1",
                where=cut.where,
                mend="give energy=0.99",
            )
    elif rank is not None:
        cut = Cut(rank=rank, where="rank")
    elif profile.rank is not None:
        cut = Cut(rank=profile.rank, where=profile.place("rank"))
    else:
        return Cut()
    if cut.rank is not None and cut.rank < 1:
        raise UsageError(f"rank is {cut.rank}, but it must be at least 1", where=cut.where, mend="give rank=16")
    if into_base:
        raise UsageError(
            "a truncation is requested, but a soup that is folded into a base model is never truncated",
            where=cut.where,
            mend="leave out rank and energy, or write an adapter instead of a full model",
        )
    return cut


def faults_of(expert: Expert) -> list[SoupError]:
    """Return the errors that reading the expert's adapter and the expert's records raises."""
    readings: tuple[Callable[[], object], ...] = (
        lambda: expert.adapter,
        lambda: expert.record,
        lambda: expert.soup,
    )
    faults: list[SoupError] = []
    for read in readings:
        try:
            read()
        except SoupError as fault:
            faults.append(fault)
    return faults


def raise_all(faults: Sequence[SoupError]) -> None:
    """Raise the error if there is one. If there are several, raise one error with the texts of all."""
    if not faults:
        return
    if len(faults) == 1:
        raise faults[0]
    kind = type(faults[0]) if len({type(fault) for fault in faults}) == 1 else InputError
    raise kind(
        f"there are {len(faults)} errors: "
        + "; ".join(f"({number}) {fault.what}" for number, fault in enumerate(faults, 1)),
        where="; ".join(f"({number}) {fault.where}" for number, fault in enumerate(faults, 1)),
        mend="; ".join(f"({number}) {fault.mend}" for number, fault in enumerate(faults, 1)),
    )


def unmet_needs(method: Method, bank: ExpertBank, weights: Sequence[float]) -> list[SoupError]:
    """Return an error for each requirement of the merge method that the experts or the weights do not meet."""
    faults: list[SoupError] = []
    if method.family != "linear":
        faults += [_no_rule(method, expert) for expert in bank.experts if expert.adapter.trained]
    if method.needs_equal_ranks:
        faults += _unequal(method, bank, "rank", lambda expert, name: expert.adapter.modules[name].rank)
    if method.needs_equal_scalings:
        faults += _unequal(method, bank, "scaling", lambda expert, name: expert.adapter.modules[name].scaling)
    if method.divides_by_sum and cancels(weights):
        faults.append(
            UsageError(
                f"the method {method.name} divides by the sum of the weights, which is {sum(weights):g}",
                where="weights",
                mend="use the method linear (method=linear), or weights whose sum is not close to 0",
            )
        )
    return faults


def _no_rule(method: Method, expert: Expert) -> SoupError:
    tensor = next(iter(expert.adapter.trained.values()))
    return UnsupportedAdapterError(
        f"the expert {expert.name} trained the tensor {tensor.name} whole ({tensor.origin}), but the method "
        f"{method.name} merges only low-rank factors",
        where=str(expert.folder),
        mend="use the method linear: method=linear",
    )


def _unequal(method: Method, bank: ExpertBank, what: str, of: Callable[[Expert, str], float]) -> list[SoupError]:
    """Return an error if the experts of a module have different values of `of(expert, module)`."""
    unequal = []
    for name in bank.modules:
        values = {bank.experts[index].name: of(bank.experts[index], name) for index in bank.members(name)}
        if len(set(values.values())) > 1:
            unequal.append(
                f"in {name}, " + ", ".join(f"{expert} has {what} {value:g}" for expert, value in values.items())
            )
    if not unequal:
        return []
    more = f" (and {len(unequal) - _MAX_SHOWN} more modules)" if len(unequal) > _MAX_SHOWN else ""
    return [
        IncompatibleExpertsError(
            f"the method {method.name} needs one {what} for all experts, but their {what}s differ: "
            + "; ".join(unequal[:_MAX_SHOWN])
            + more,
            where=", ".join(expert.name for expert in bank.experts),
            mend="use the method linear (method=linear), which accepts different ranks and scalings",
        )
    ]


@contextmanager
def naming_user(plan: MergePlan) -> Iterator[None]:
    """Add the user's name to every UsageError that the `with` block raises.

    In a merge for many users, the message must show which profile is wrong.
    """
    try:
        yield
    except UsageError as fault:
        user = plan.profile.user
        raise UsageError(f"user {user!r}: {fault.what}", where=plan.profile.place("weights"), mend=fault.mend) from None
