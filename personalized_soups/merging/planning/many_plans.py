"""Plans for many users. Profiles with the same experts share the decisions that depend only on the experts."""

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
from personalized_soups.merging.planning.plan import MergePlan
from personalized_soups.merging.planning.planner import plan_merge

# The maximum number of plans that are kept. A plan lists every module, so more plans would need much memory.
_MOST_PATTERNS = 64
# File systems allow names of 255 bytes, and the scratch folder's name is longer than the user's.
_MAX_NAME_BYTES = 200


class ManyPlans:
    """Makes the plans of many profiles. A plan is reused for later profiles with the same experts.

    Args:
        library: the experts.
        options: the choices that override those of the profiles. The default is `MergeOptions()`.
        into_base: plan to fold the soups into a base model.
    """

    def __init__(self, library: ExpertLibrary, options: MergeOptions | None = None, *, into_base: bool = False) -> None:
        self.library = library
        self._options = options
        self._into_base = into_base
        self._known: dict[object, _Pattern] = {}

    def plan(self, profile: Profile) -> tuple[object, MergePlan]:
        """Return a key and the plan of the profile. Plans with equal keys can be merged in one batch.

        Raises:
            DeclarationError: if the user's name cannot be the name of a folder.
            SoupError: all errors of `plan_merge`.
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
        except UsageError as fault:  # the cause can be an option of the caller or the profile, so both are named
            where = f"{fault.where} ({profile.place('user')})"
            raise UsageError(f"user {profile.user!r}: {fault.what}", where=where, mend=fault.mend) from None


@dataclass(frozen=True, eq=False, slots=True)
class _Pattern:
    """A plan that is reused for other profiles with the same experts.

    Attributes:
        plan: the plan of the first profile with these experts.
        bank: the experts.
        sides: checks that a profile does not name experts of two sides of one dimension.
    """

    plan: MergePlan
    bank: ExpertBank
    sides: SideRule

    @classmethod
    def of(cls, plan: MergePlan, library: ExpertLibrary) -> _Pattern:
        experts = [library[expert.name] for expert in plan.experts]
        return cls(plan, ExpertBank(experts), SideRule.of(experts))

    def filled(self, library: ExpertLibrary, profile: Profile, weights: Mapping[str, float]) -> MergePlan:
        """Return the plan with another profile and its weights. The errors are those of `plan_merge`."""
        library.check(profile)
        self.sides.check(profile)
        experts = tuple(replace(expert, weight=weights[expert.name]) for expert in self.plan.experts)
        if self.plan.method.divides_by_sum:
            raise_all(unmet_needs(self.plan.method, self.bank, [expert.weight for expert in experts]))
        return replace(self.plan, profile=profile, experts=experts)


def _check_user(profile: Profile) -> None:
    """Check that the user's name can be the name of a folder.

    Raises:
        DeclarationError: if the name is missing, too long, or not a plain name. The error shows the profile's line.
    """
    name = profile.user
    is_plain = not set(name) & set("/\\") and name.isprintable() and not name.startswith(".")
    if (
        not is_plain
        or len(name.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES
        or "user" not in profile.model_fields_set
    ):
        raise DeclarationError(
            f"the user's name {name[:80]!r} cannot be the name of a folder"
            if "user" in profile.model_fields_set
            else "the profile does not name a user, but the soup's folder gets the user's name",
            where=profile.place("user"),
            mend="write a name such as `user: u1042`; it must be printable, contain no slash, not start with a dot, "
            f"and have at most {_MAX_NAME_BYTES} bytes",
        )
