"""Replace the Python arguments that an error names by the options of the running command.

The library does not know its caller, so its errors name arguments: `where="rank"`, and `give rank=16` in texts. A user
of the command line knows options: `--rank`, and `give --rank 16`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

from personalized_soups.errors import SoupError

# A quoted text may be a name that a user chose, so it is copied. An apostrophe within a word opens no quotation.
_QUOTED = r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`[^`]*`|“[^”]*”)(?!\w)"""
# A value ends before the punctuation of its sentence. `...` is a placeholder for any value.
_VALUE = r"""\.\.\.|"[^"]*"|'[^']*'|[^\s"'`;)]*[^\s"'`;:,.)]"""
_TEXT = re.compile(rf"(?P<quoted>{_QUOTED})|(?<![^\s(])(?P<name>[a-z][a-z_]*)=(?P<value>{_VALUE})")
_ARGUMENT = re.compile(rf"(?P<name>[a-z][a-z_]*)=(?P<value>{_VALUE})")


class SoupCommand(TyperCommand):
    """A command whose errors name its options."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            SoupError: as the command's function, with options in place of arguments.
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
        flag: the option as a user writes it, such as `--same-base`.
        takes_value: whether a value follows the option.
    """

    flag: str
    takes_value: bool


def options_of(command: Any) -> dict[str, Option]:
    """Return the options of a click command by the name of their argument (`lambda_` is `lambda`)."""
    return {
        param.name.rstrip("_"): Option(param.opts[0], takes_value=not param.is_flag)
        for param in command.params
        if param.param_type_name == "option"
    }


def name_options(error: SoupError, options: Mapping[str, Option], *, given: Collection[str] = ()) -> None:
    """Replace the arguments in all three parts of an error by options.

    Args:
        error: the error, which is changed.
        options: the command's options by argument name.
        given: texts from the command line. A place that equals one of them is a user's file, not an argument.
    """
    error.what = with_options(error.what, options)
    error.where = ", ".join(_place(place, options, given) for place in error.where.split(", "))
    error.mend = with_options(error.mend, options)


def with_options(text: str, options: Mapping[str, Option]) -> str:
    """Return the text with `--its-option value` in place of each `name=value` that names an option.

    `name=True` becomes the option alone. Quoted text and names without an option are copied.
    """
    return _TEXT.sub(lambda match: match[0] if match["quoted"] else _written(match, options), text)


def _place(place: str, options: Mapping[str, Option], given: Collection[str]) -> str:
    """Return the option in place of `name`, `name=value` or `name: key`."""
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
    """Yield the values of parameters as texts, those of repeated options separately."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _texts(value)
        elif value is not None and not isinstance(value, bool):
            yield str(value)
