"""The search for a tensor in a base's files, given its name in the model in memory.

Adapters use the names in memory. The files have other names if a class of transformers keeps the inner model in another
attribute, if a training tool left its wrapper in the names, or if transformers renames tensors when it loads them. The
search tries these steps in order:

1. Look for the name itself.
2. Remove the wrappers (`_orig_mod`, `module`) from the name and from the files' names, and look for the name again.
3. Look for names in the files that end in the core of the name. The core has no wrappers and does not start with the
   attributes `model`, `transformer`, `language_model`, ... (names.py).
4. Rename the files' names with transformers' own tables (renaming.py). This step imports transformers.

The first step with exactly one matching tensor decides. Other parts of a name are never dropped: `lm_q.layers.0` does
not match `layers.0`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from personalized_soups.adapters.names import are_model_steps, core_name, without_wrappers
from personalized_soups.adapters.renaming import Renaming
from personalized_soups.errors import choose_from

# Model types in which a name stands for one tensor in the files and for another one in memory. For these model types,
# only step 4 is used. A test compares this list with transformers' tables.
SHIFTED_NAMES = frozenset({"kimi_k25"})

_MAX_SHOWN = 3


class StoredNames:
    """The names of the tensors in a base's files, with a search.

    Args:
        names: the names in the files.
        model_type: the `model_type` of the base's configuration.
        renamings: a function that returns the renamings of transformers' classes. It is called only for step 4.
    """

    def __init__(
        self, names: Iterable[str], model_type: str | None, renamings: Callable[[], tuple[Renaming, ...]]
    ) -> None:
        self._names = frozenset(names)
        self._are_shifted = model_type in SHIFTED_NAMES
        self._load_renamings = renamings
        self._found: dict[str, str | None] = {}
        self._by_end: dict[int, Mapping[str, list[str]]] = {}

    def find(self, tensor: str) -> str | None:
        """Return the files' name for a tensor of the model in memory, or None unless exactly one name matches."""
        if tensor not in self._found:
            self._found[tensor] = self._search(tensor)
        return self._found[tensor]

    def why_not(self, tensor: str) -> str:
        """Return why `find` returns None for a tensor, as a message with the most similar names in the files."""
        made_of = sorted({name for each in self._renamings for name in each.made_of.get(without_wrappers(tensor), ())})
        if made_of:
            return f"transformers computes it from {_few(made_of)}, which this version does not support"
        similar = sorted({*self._unwrapped.get(_plain(tensor), ()), *self._ending_in(core_name(tensor))})
        if similar:
            return f"the files have similar names, which may belong to other tensors: {_few(similar)}"
        return choose_from(tensor, self._names)

    def _search(self, tensor: str) -> str | None:
        if self._are_shifted:
            return self._renamed(tensor)
        if tensor in self._names:
            return tensor
        unwrapped = self._unwrapped.get(_plain(tensor), [])
        if len(unwrapped) == 1:
            return unwrapped[0]
        core = core_name(tensor)
        ending = self._ending_in(core)
        if len(ending) == 1 and _may_be(core, ending[0]):
            return ending[0]
        return self._renamed(tensor)

    def _renamed(self, tensor: str) -> str | None:
        """Return the files' name by transformers' renamings, or None unless all classes that have the tensor agree."""
        names = {name for each in self._renamings if (name := each.stored(without_wrappers(tensor))) is not None}
        if not names:
            plain = _plain(tensor)
            names = {name for each in self._renamings if (name := each.stored(plain)) is not None}
        return names.pop() if len(names) == 1 else None

    @cached_property
    def _renamings(self) -> tuple[Renaming, ...]:
        return self._load_renamings()

    @cached_property
    def _unwrapped(self) -> Mapping[str, list[str]]:
        by_plain: dict[str, list[str]] = {}
        for name in sorted(self._names):
            by_plain.setdefault(_plain(name), []).append(name)
        return by_plain

    def _ending_in(self, core: str) -> list[str]:
        """Return the names in the files that end in the steps of a core once their wrappers are removed."""
        length = core.count(".") + 1
        if length not in self._by_end:
            by_end: dict[str, list[str]] = {}
            for plain, names in self._unwrapped.items():
                by_end.setdefault(".".join(plain.split(".")[-length:]), []).extend(names)
            self._by_end[length] = by_end
        return self._by_end[length].get(core, [])


def _may_be(core: str, stored: str) -> bool:
    """Return whether the only name in the files that ends in a core certainly is the name of that tensor.

    A core that contains the number of a layer is distinctive. Without a number (`score.weight`), other modules may have
    names that end in the core, so the steps of `stored` before the core must be attributes of the inner model.
    """
    if any(step.isdigit() for step in core.split(".")):
        return True
    return are_model_steps(_plain(stored).removesuffix(core).removesuffix("."))


def _plain(name: str) -> str:
    return without_wrappers(name, maybe=True)


def _few(names: list[str]) -> str:
    more = f" (and {len(names) - _MAX_SHOWN} more)" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
