"""Replace the names of Python arguments in errors with the options of the running command.

The library does not know its caller, so its errors name Python arguments, e.g. `where="rank"` and `give rank=16`. A
user of the command line needs the options instead: `--rank` and `give --rank 16`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

from personalized_soups.errors import SoupError

# Quoted text may be a name that a user chose, so it is not changed. An apostrophe in a word does not start a quotation.
_QUOTED = r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`[^`]*`|“[^”]*”)(?!\w)"""
# A value ends before the punctuation of its sentence. `...` is a placeholder for any value.
_VALUE = r"""\.\.\.|"[^"]*"|'[^']*'|[^\s"'`;)]*[^\s"'`;:,.)]"""
_TEXT = re.compile(rf"(?P<quoted>{_QUOTED})|(?<![^\s(])(?P<name>[a-z][a-z_]*)=(?P<value>{_VALUE})")
_ARGUMENT = re.compile(rf"(?P<name>[a-z][a-z_]*)=(?P<value>{_VALUE})")


class SoupCommand(TyperCommand):
    """A command that replaces the names of Python arguments in its errors with its options."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            SoupError: the error that the command's function raises, with options in place of argument names.
        """
        try:
            return super().invoke(ctx)
        except SoupError as error:
            name_options(error, options_of(self), given=set(_texts(ctx.params.values())))
            raise


@dataclass(frozen=True, slots=True)
class Option:
    """An option of a command.

    Attributes:
        flag: the option as a user types it, e.g. `--same-base`.
        takes_value: whether a value follows the option.
    """

    flag: str
    takes_value: bool


def options_of(command: Any) -> dict[str, Option]:
    """Return the options of a click command, by argument name without a final `_` (`lambda_` becomes `lambda`)."""
    return {
        param.name.rstrip("_"): Option(param.opts[0], takes_value=not param.is_flag)
        for param in command.params
        if param.param_type_name == "option"
    }


def name_options(error: SoupError, options: Mapping[str, Option], *, given: Collection[str] = ()) -> None:
    """Replace the argument names in all three parts of an error with options.

    Args:
        error: the error, which is changed in place.
        options: the command's options by argument name.
        given: values from the command line. A place in `error.where` that equals one of these values is a user's file,
            not an argument.
    """
    error.what = with_options(error.what, options)
    error.where = ", ".join(_place(place, options, given) for place in error.where.split(", "))
    error.mend = with_options(error.mend, options)


def with_options(text: str, options: Mapping[str, Option]) -> str:
    """Return the text with each `name=value` replaced by the option, e.g. `rank=16` by `--rank 16`.

    For a flag, `name=True` becomes the flag alone. Quoted text and names without an option are not changed.
    """
    return _TEXT.sub(lambda match: match[0] if match["quoted"] else _written(match, options), text)


def _place(place: str, options: Mapping[str, Option], given: Collection[str]) -> str:
    """Return `place` with its argument name replaced by the option. Values from the command line are not changed.

    A place has the form `name`, `name=value` or `name: key`.
    """
    name, colon, key = place.partition(": ")
    if name in given:
        return place
    if name in options:
        return f"{options[name].flag}{colon}{key}"
    match = _ARGUMENT.fullmatch(place)
    return place if match is None else _written(match, options)


def _written(match: re.Match[str], options: Mapping[str, Option]) -> str:
    option = options.get(match["name"])
    if option is None:
        return match[0]
    if not option.takes_value and match["value"] == "True":
        return option.flag
    value = match["value"].strip("'\"")
    return f"{option.flag} {value}"


def _texts(values: Any) -> Iterator[str]:
    """Yield all values of the parameters as text, except None and booleans. Repeated options have several values."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _texts(value)
        elif value is not None and not isinstance(value, bool):
            yield str(value)
