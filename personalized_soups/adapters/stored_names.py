"""Under which name a base's files hold a tensor that an adapter names by its place in the model in memory.

The two differ where a class of transformers keeps the model proper under another attribute than the files do, where a
training tool left its wrapper in the names, and where transformers renames tensors while it loads them. In this order:

1. the name itself;
2. the name without wrappers (`_orig_mod`, `module`), on both sides;
3. the only name in the files that ends in the core of the name: what is left of it without wrappers and without the
   attributes `model`, `transformer`, `language_model`, ... at its beginning;
4. what transformers makes of the files' names (renaming.py), which imports it.

A step decides if exactly one tensor fits. Nothing else is dropped from a name: `lm_q.layers.0` is not `layers.0`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from personalized_soups.adapters.names import are_model_steps, core_name, without_wrappers
from personalized_soups.adapters.renaming import Renaming
from personalized_soups.errors import choose_from

# Models whose files give to one tensor the name that another has in memory: here a name in both says nothing. Held to
# transformers' tables by a test.
SHIFTED_NAMES = frozenset({"kimi_k25"})

_MAX_SHOWN = 3


class StoredNames:
    """The names of a base's tensors.

    Args:
        names: in the files.
        model_type: of the base's configuration.
        renamings: returns what transformers' classes make of the names; called when nothing else decides.
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
        """Return the name in the files of a tensor of the model in memory; None if there is none or more than one."""
        if tensor not in self._found:
            self._found[tensor] = self._search(tensor)
        return self._found[tensor]

    def why_not(self, tensor: str) -> str:
        """Return why `find` has no name for a tensor, with the names in the files that are nearest to it."""
        made_of = sorted({name for each in self._renamings for name in each.made_of.get(without_wrappers(tensor), ())})
        if made_of:
            return f"transformers computes it from tensors of the files, which this version does not: {_few(made_of)}"
        similar = sorted({*self._unwrapped.get(_plain(tensor), ()), *self._ending_in(core_name(tensor))})
        if similar:
            return f"the files hold {_few(similar)}, and nothing says that this is the same tensor"
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
        """Return the name that all classes of transformers agree on which know the tensor."""
        found = {name for each in self._renamings if (name := each.stored(without_wrappers(tensor))) is not None}
        if not found:
            plain = _plain(tensor)
            found = {name for each in self._renamings if (name := each.stored(plain)) is not None}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def _renamings(self) -> tuple[Renaming, ...]:
        return self._load_renamings()

    @cached_property
    def _unwrapped(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in sorted(self._names):
            found.setdefault(_plain(name), []).append(name)
        return found

    def _ending_in(self, core: str) -> list[str]:
        """Return the names in the files that end in all steps of a core, without wrappers."""
        length = core.count(".") + 1
        if length not in self._by_end:
            by_end: dict[str, list[str]] = {}
            for plain, names in self._unwrapped.items():
                by_end.setdefault(".".join(plain.split(".")[-length:]), []).extend(names)
            self._by_end[length] = by_end
        return self._by_end[length].get(core, [])


def _may_be(core: str, stored: str) -> bool:
    """Return whether the only name that ends in a core is certain to be that tensor's.

    A core with a layer's number is distinctive. One without (`score.weight`) is not: another module deep in the model
    may end alike, so nothing but the model proper may be around it.
    """
    if any(step.isdigit() for step in core.split(".")):
        return True
    return are_model_steps(_plain(stored).removesuffix(core).removesuffix("."))


def _plain(name: str) -> str:
    return without_wrappers(name, maybe=True)


def _few(names: list[str]) -> str:
    more = f" (and {len(names) - _MAX_SHOWN} more)" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
