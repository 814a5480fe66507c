"""Every error that a user may meet says three things: what is wrong, where, and how to mend it.

The three parts are separate arguments, so that none can be forgotten and a test can assert each.
The command line prints them and exits with the error's `exit_code`: 2 for usage or input, 1 for a run that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from typing import ClassVar

# A mend that lists every tensor of a model is none.
_MAX_NAMES = 24


class SoupError(Exception):
    """What went wrong, where, and the mend.

    Args:
        what: one sentence on the fault, with the value found and the value expected.
        where: a file (with line where there is one), a folder, a module's name, or an option.
        mend: what the reader should do now.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str, mend: str) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.what}\n   at: {self.where}\n mend: {self.mend}"

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the three parts across a process border (worker processes send their errors home)."""
        return (_rebuild, (type(self), self.what, self.where, self.mend))


class UsageError(SoupError):
    """The command or call itself is at fault: options that contradict, a name that is not known."""

    exit_code = 2


class InputError(SoupError):
    """Something the user gave is at fault: a file that lies, data that cannot be used."""

    exit_code = 2


class DeclarationError(InputError):
    """A profile, recipe or catalogue says something that cannot be: unknown key, bad weight, repeated name."""


class FileFormatError(InputError):
    """A file is not what its name promises: truncated, lying header, wrong encoding, pickle."""


class UnsupportedAdapterError(InputError):
    """An adapter uses a variant of LoRA that this version does not merge; refused by name, never guessed at."""


class IncompatibleExpertsError(InputError):
    """Experts (or an expert and the base) disagree: other base model, other shapes, other ranks."""


class OutputExistsError(UsageError):
    """The output is there already and `overwrite` is false."""


class RunError(SoupError):
    """Usage and input are sound and the run failed all the same: a full disk, a lost process."""

    exit_code = 1


def _rebuild(kind: type[SoupError], what: str, where: str, mend: str) -> SoupError:
    return kind(what, where=where, mend=mend)


def check_extra(extra: str, *modules: str) -> None:
    """Raise UsageError, with the command that installs them, if packages of an optional extra are missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            where=f"the extra {extra!r} of personalized-soups",
            mend=f"pip install 'personalized-soups[{extra}]', or in a checkout: pip install '.[{extra}]'",
        )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most like `name`, or None where none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def choose_from(name: str, known: Iterable[str]) -> str:
    """Return a mend for an unknown name: the nearest known one, else the list."""
    names = sorted(known)
    near = nearest(name, names)
    if near is not None:
        return f"did you mean {near!r}?"
    if not names:
        return "nothing of this kind is known here"
    more = f" (and {len(names) - _MAX_NAMES} more)" if len(names) > _MAX_NAMES else ""
    return f"choose from: {', '.join(names[:_MAX_NAMES])}{more}"
