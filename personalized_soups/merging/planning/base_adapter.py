"""Checks of the base adapter (`on`) of a merge: the adapter, such as an SFT adapter, below the experts."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.adapters.compatible import other_names, other_shapes, strangers, unlike
from personalized_soups.adapters.library import Expert
from personalized_soups.errors import SoupError, UnsupportedAdapterError, UsageError
from personalized_soups.merging.planning.checks import raise_all
from personalized_soups.merging.planning.options import MergeOptions
from personalized_soups.merging.planning.plan import MergePlan


def open_base_adapter(options: MergeOptions, experts: Sequence[Expert]) -> BaseAdapter | None:
    """Return the base adapter of the options, or None if none is given, and check that the experts fit it.

    Raises:
        IncompatibleExpertsError: if an expert records another base adapter, if the adapter records another base than
            the experts, or if its modules have other names or shapes than those of the experts.
        UnsupportedAdapterError: if the adapter or an expert has more than low-rank factors.
        InputError, FileFormatError: if the adapter cannot be read.
    """
    if options.on is None:
        return None
    on = BaseAdapter.open(options.on)
    raise_all([*unlike(experts, on.record), *(fault for expert in experts for fault in _more_than_factors(expert))])
    fingerprint = next((expert.base.fingerprint for expert in experts if expert.base.fingerprint is not None), None)
    sources = [*experts, on.expert]
    other_base = [] if options.same_base or fingerprint is None else strangers([on.expert], fingerprint, "on")
    raise_all([*other_base, *other_names(sources), *other_shapes(sources)])
    return on


def check_includes_adapter(plan: MergePlan) -> None:
    """Check that a soup for a full model includes the adapter on top of which its experts were trained.

    Raises:
        UsageError: if the experts were trained on top of an adapter, but the plan does not include the adapter.
    """
    if plan.on is not None and plan.on_folder is None:
        raise UsageError(
            f"the experts were trained on top of the adapter {plan.on.name} ({plan.on.digest[:12]}), so a full model "
            "needs this adapter too, but it is not given",
            where="on",
            mend=f"give the folder of this adapter: on={plan.on.name}",
        )


def checked_rank(rank: int, module: str, on_rank: int) -> int:
    """Return the rank that is left for the experts' soup of a module.

    Raises:
        UsageError: if the base adapter takes all ranks.
    """
    if rank < 1:
        raise UsageError(
            f"the merged adapter may have rank {rank + on_rank}, but in {module} the base adapter alone has rank "
            f"{on_rank}, and the base adapter is never truncated",
            where="rank",
            mend=f"give rank={on_rank + 1} or more, or write the soup without the adapter (leave out on)",
        )
    return rank


def _more_than_factors(expert: Expert) -> list[SoupError]:
    tensor = next(iter(expert.adapter.trained.values()), None)
    if tensor is None:
        return []
    return [
        UnsupportedAdapterError(
            f"the expert {expert.name} trained the tensor {tensor.name} whole ({tensor.origin}), but on top of an "
            "adapter only low-rank factors can be merged",
            where=str(expert.folder),
            mend="merge the adapter into the base first, and give the merged model as the base",
        )
    ]
