"""The errors that users see. Each has three parts: what is wrong, where, and how to fix it.

The parts are separate arguments, so that none can be forgotten and tests can check each. The command line prints them
and exits with the error's `exit_code`: 2 for wrong usage or input, 1 for a run that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from typing import ClassVar

# The most names that a fix lists: a list of every tensor of a model would not help.
_MAX_NAMES = 24


class SoupError(Exception):
    """An error with its place and its fix.

    Args:
        what: what is wrong, in one sentence, with the value found and the value expected.
        where: a file (with the line, if known), a folder, a module's name, or an option.
        mend: how to fix it, in the imperative.

    Example:
        >>> try:
        ...     ExpertLibrary.open("nowhere")
        ... except SoupError as error:
        ...     print(error.where)
        nowhere
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
        """Keep the three parts when the error is pickled: worker processes send their errors to the main process."""
        return (_rebuild, (type(self), self.what, self.where, self.mend))


class UsageError(SoupError):
    """The command or call is wrong, for example contradicting options or an unknown name."""

    exit_code = 2


class InputError(SoupError):
    """A file or other data from the user cannot be used."""

    exit_code = 2


class DeclarationError(InputError):
    """A profile, recipe or catalogue is invalid: an unknown key, a bad weight, a repeated name."""


class FileFormatError(InputError):
    """A file does not have the format of its name: truncated, invalid header, wrong encoding, pickle."""


class UnsupportedAdapterError(InputError):
    """An adapter uses a variant of LoRA that this version does not merge. The message names the variant."""


class IncompatibleExpertsError(InputError):
    """Experts, or an expert and the base, do not fit together: different base models, shapes or ranks."""


class OutputExistsError(UsageError):
    """The output exists already and `overwrite` is false."""


class RunError(SoupError):
    """A run with valid usage and input failed, for example on a full disk or because a process was killed."""

    exit_code = 1


def _rebuild(kind: type[SoupError], what: str, where: str, mend: str) -> SoupError:
    return kind(what, where=where, mend=mend)


def check_extra(extra: str, *modules: str) -> None:
    """Raise UsageError, with the install command, if packages of an optional extra are missing."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this feature needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            where=f"the extra {extra!r} of personalized-soups",
            mend=f"run pip install 'personalized-soups[{extra}]', or in a checkout: pip install '.[{extra}]'",
        )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to `name`, or None if none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def choose_from(name: str, known: Iterable[str]) -> str:
    """Return the fix for an unknown name: the most similar known name, or else the list of known names."""
    names = sorted(known)
    match = nearest(name, names)
    if match is not None:
        return f"did you mean {match!r}?"
    if not names:
        return "remove the name: there are no names to choose from"
    more = f" (and {len(names) - _MAX_NAMES} more)" if len(names) > _MAX_NAMES else ""
    return f"choose from: {', '.join(names[:_MAX_NAMES])}{more}"
