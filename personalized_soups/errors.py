"""The errors that users see. Each has three parts: what is wrong, where, and how to fix it.

The three parts are separate arguments, so that no part can be forgotten and tests can check each part. The command
line prints them and exits with the `exit_code` of the error: 2 for wrong usage or input, 1 for a run that failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec
from typing import ClassVar

# The maximum number of names that a fix lists. A list of all tensors of a model would not help.
_MAX_NAMES = 24


class SoupError(Exception):
    """An error that says what is wrong, where it is wrong, and how to fix it.

    Args:
        what: what is wrong, in one sentence, with the value found and the value expected.
        where: the place: a file (with the line, if it is known), a folder, the name of a module, or an option.
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
    """The command or the call is wrong, for example because options contradict each other or a name is unknown."""

    exit_code = 2


class InputError(SoupError):
    """The package cannot use a file or other data that the user gave."""

    exit_code = 2


class DeclarationError(InputError):
    """A profile, recipe or catalogue is invalid, for example because it has an unknown key or a repeated name."""


class FileFormatError(InputError):
    """A file does not have the expected format, for example because it is truncated, not UTF-8 or a pickle."""


class UnsupportedAdapterError(InputError):
    """An adapter uses a variant of LoRA that this package cannot merge. The message names the variant."""


class IncompatibleExpertsError(InputError):
    """Experts do not fit each other or the base model, for example because their shapes differ."""


class OutputExistsError(UsageError):
    """The output cannot be written where it was requested, for example because it exists and `overwrite` is false."""


class RunError(SoupError):
    """A run failed although its usage and input were valid, for example because the disk was full."""

    exit_code = 1


def _rebuild(kind: type[SoupError], what: str, where: str, mend: str) -> SoupError:
    return kind(what, where=where, mend=mend)


def check_extra(extra: str, *modules: str) -> None:
    """Raise an error with the install command if a module of an optional extra is not installed.

    Args:
        extra: the name of the extra, such as `serve`.
        *modules: the modules that must be installed.

    Raises:
        UsageError: if at least one of the modules is missing.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this feature needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            where=f"the extra {extra!r} of personalized-soups",
            mend=f"run pip install 'personalized-soups[{extra}]', or in a checkout: pip install '.[{extra}]'",
        )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to `name`, or None if no known name is similar to it."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def choose_from(name: str, known: Iterable[str]) -> str:
    """Return the fix for an unknown name: a question with the most similar known name, or a list of known names.

    The list is returned if no known name is similar to `name`.
    """
    names = sorted(known)
    match = nearest(name, names)
    if match is not None:
        return f"did you mean {match!r}?"
    if not names:
        return "remove the name: there are no names to choose from"
    more = f" (and {len(names) - _MAX_NAMES} more)" if len(names) > _MAX_NAMES else ""
    return f"choose from: {', '.join(names[:_MAX_NAMES])}{more}"
