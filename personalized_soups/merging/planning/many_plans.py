"""Plans for many users: decisions about the experts are made once for each set of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import DeclarationError, UsageError
from personalized_soups.merging.planning.checks import raise_all, unmet_needs
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import MergePlan, PlannedExpert
from personalized_soups.merging.planning.planner import plan_merge

_MOST_PATTERNS = 64
_MAX_NAME_BYTES = 200


class ManyPlans:
    """Plans for many profiles. Decisions that depend on the experts alone are made once for each set of experts.

    Args:
        library: the experts.
        options: the choices that override the profiles'; the defaults if left out.
        into_base: plan to fold the soups into a base model.
    """

    def __init__(self, library: ExpertLibrary, options: MergeOptions | None = None, *, into_base: bool = False) -> None:
        self.library = library
        self._options = options
        self._into_base = into_base
        self._known: dict[object, _Pattern] = {}

    def plan(self, profile: Profile) -> tuple[object, MergePlan]:
        """Return a key, equal for plans that can be merged together, and the profile's plan.

        Raises:
            DeclarationError: if the user's name cannot be that of a folder.
            SoupError: everything that plan_merge raises.
        """
        _check_user(profile)
        weights = {name: weight for name, weight in profile.resolved_weights().items() if weight != 0}
        key = (frozenset(weights), profile.method, profile.rank, frozenset(profile.options.items()))
        try:
            if key not in self._known:
                if len(self._known) >= _MOST_PATTERNS:
                    self._known.clear()
                plan = plan_merge(self.library, profile, self._options, into_base=self._into_base)
                self._known[key] = _Pattern.of(plan, self.library)
            return key, self._known[key].filled(self.library, profile, weights)
        except UsageError as fault:  # of the command, or of this one line
            where = f"{fault.where} ({profile.place('user')})"
            raise UsageError(f"{profile.user!r}: {fault.what}", where=where, mend=fault.mend) from None


@dataclass(frozen=True, eq=False, slots=True)
class _Pattern:
    """A plan over some experts, to be filled with anybody's weights over them."""

    plan: MergePlan
    bank: ExpertBank
    sides: SideRule

    @classmethod
    def of(cls, plan: MergePlan, library: ExpertLibrary) -> _Pattern:
        experts = [library[expert.name] for expert in plan.experts]
        return cls(plan, ExpertBank(experts), SideRule.of(experts))

    def filled(self, library: ExpertLibrary, profile: Profile, weights: Mapping[str, float]) -> MergePlan:
        library.check(profile)
        self.sides.check(profile)
        experts = tuple(PlannedExpert(each.name, each.folder, weights[each.name]) for each in self.plan.experts)
        if self.plan.method.divides_by_sum:
            raise_all(unmet_needs(self.plan.method, self.bank, [each.weight for each in experts]))
        return replace(self.plan, profile=profile, experts=experts)


def _check_user(profile: Profile) -> None:
    """Raise if a user's name cannot be that of a folder of their own.

    Raises:
        DeclarationError: naming the line.
    """
    name = profile.user
    is_plain = not set(name) & set("/\\") and name.isprintable() and not name.startswith(".")
    if (
        not is_plain
        or len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES
        or "user" not in profile.model_fields_set
    ):
        raise DeclarationError(
            f"the user {name[:80]!r} cannot be the name of a folder"
            if "user" in profile.model_fields_set
            else "the profile names no user",
            where=profile.place("user"),
            mend="write `user: u1042`: letters, digits and signs but slashes, not beginning with a dot, at most "
            f"{_MAX_NAME_BYTES} bytes",
        )
