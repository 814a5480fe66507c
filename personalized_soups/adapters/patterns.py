"""The keys of rank_pattern and alpha_pattern: regular expressions to PEFT, matched here in bounded time.

PEFT asks `re.match(rf"(.*\\.)?({key})$", module)` of the keys in turn (peft.utils.other.get_pattern_key). Python's
matcher goes back and forth, so that a stranger's `(a+)+$` runs for years. Here an expression is parsed by Python's own
parser and run as a finite automaton (Thompson, CACM 11(6), 1968), one step a character; what no automaton can do
(references to groups, looking ahead and behind) and what is too large is refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

# Python's parser of regular expressions and the names of what it finds; `re` itself stands on them.
_parser: Any = importlib.import_module("re._parser")
_is: Any = importlib.import_module("re._constants")

# The usual key is a module's name, whole or its end. Python's own matcher takes at most |key| * |module| steps for it.
_NAME = re.compile(r"\^?(?:[\w\-]|\\?\.)+\$?")

_MAX_KEY = 1000
_MAX_STATES = 2000
# States times characters, over all keys and modules of one adapter: a minute at most. 10,000 modules and ten
# expressions of twenty states take a tenth of it.
_MAX_STEPS = 100_000_000

_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    _is.CATEGORY_DIGIT: str.isdecimal,
    _is.CATEGORY_SPACE: str.isspace,
    _is.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    _is.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    _is.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    _is.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
}


class Patterns:
    """The keys of one table, in their order.

    Raises:
        ValueError: naming the first key that cannot be matched in bounded time, or is no regular expression.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._matchers = [(key, _matcher(key)) for key in keys]
        self._steps_left = _MAX_STEPS

    def first(self, module: str) -> str | None:
        """Return the first key that matches a module's name, or None.

        Raises:
            ValueError: if all matches so far have taken more steps than any sound adapter needs.
        """
        for key, matcher in self._matchers:
            self._steps_left -= len(module) * len(matcher.states) if isinstance(matcher, _Automaton) else 1
            if self._steps_left < 0:
                raise ValueError(f"matching {key[:80]!r} and others against so many modules takes too long")
            if matcher.match(module):
                return key
        return None


def _matcher(key: str) -> _Automaton | re.Pattern[str]:
    expression = rf"(.*\.)?({key})$"
    if _NAME.fullmatch(key):
        return re.compile(expression)
    if len(key) > _MAX_KEY:
        raise ValueError(f"the regular expression {key[:80]!r}... has {len(key)} characters")
    try:
        return _Automaton(_parser.parse(expression))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key[:80]!r} is no regular expression: {error}") from None
    except _TooMuchError as error:
        raise ValueError(f"the regular expression {key[:80]!r} {error}") from None


class _TooMuchError(Exception):
    """What an expression has that no small automaton does."""


class _Automaton:
    """States, of which a `None` test costs no character: (test of a character, or of a place, or none; next states)."""

    def __init__(self, parsed: Any) -> None:
        if parsed.state.flags & ~re.UNICODE.value:
            raise _TooMuchError("sets flags")
        self.states: list[tuple[Callable[[str], bool] | None, Callable[[int, str], bool] | None, list[int]]] = []
        self._end = self._state()
        self._start = self._sequence(parsed, self._end)

    def match(self, text: str) -> bool:
        """Return whether `re.match(expression, text)` finds anything."""
        current = self._closure([self._start], 0, text)
        for place, char in enumerate(text):
            if self._end in current or not current:
                break
            moved = []
            for number in current:
                test, _, following = self.states[number]
                if test is not None and test(char):
                    moved += following
            current = self._closure(moved, place + 1, text)
        return self._end in current

    def _closure(self, numbers: list[int], place: int, text: str) -> set[int]:
        """Return what can be reached from states without a character."""
        found: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            if number in found:
                continue
            found.add(number)
            test, stands, following = self.states[number]
            if test is None and (stands is None or stands(place, text)):
                waiting += following
        return found

    def _state(
        self,
        *following: int,
        test: Callable[[str], bool] | None = None,
        stands: Callable[[int, str], bool] | None = None,
    ) -> int:
        if len(self.states) == _MAX_STATES:
            raise _TooMuchError(f"needs more than {_MAX_STATES} states")
        self.states.append((test, stands, list(following)))
        return len(self.states) - 1

    def _sequence(self, parsed: Any, after: int) -> int:
        for operation, argument in reversed(list(parsed)):
            after = self._one(operation, argument, after)
        return after

    def _one(self, operation: Any, argument: Any, after: int) -> int:
        """Return the state from which one node of the parsed expression leads to `after`."""
        if operation is _is.BRANCH:
            return self._state(*(self._sequence(branch, after) for branch in argument[1]))
        if operation is _is.SUBPATTERN:
            _, added, removed, inner = argument
            if added or removed:
                raise _TooMuchError("sets flags")
            return self._sequence(inner, after)
        if operation in {_is.MAX_REPEAT, _is.MIN_REPEAT}:  # greedy or not makes no odds to whether it matches
            return self._repeated(*argument, after=after)
        if operation is _is.AT:
            return self._state(after, stands=_place(argument))
        return self._state(after, test=_character(operation, argument))

    def _repeated(self, least: int, most: int, inner: Any, *, after: int) -> int:
        if most == _is.MAXREPEAT:
            loop = self._state(after)
            self.states[loop][2].append(self._sequence(inner, loop))
            after = loop
        else:
            for _ in range(most - least):
                after = self._state(after, self._sequence(inner, after))
        for _ in range(least):
            after = self._sequence(inner, after)
        return after


def _place(code: Any) -> Callable[[int, str], bool]:
    if code in {_is.AT_BEGINNING, _is.AT_BEGINNING_STRING}:
        return lambda place, _: place == 0
    if code is _is.AT_END:  # before a last line's end, too
        return lambda place, text: place == len(text) or (place == len(text) - 1 and text.endswith("\n"))
    if code is _is.AT_END_STRING:
        return lambda place, text: place == len(text)
    raise _TooMuchError(f"has {str(code).lower()}")


def _character(operation: Any, argument: Any) -> Callable[[str], bool]:
    if operation is _is.LITERAL:
        return lambda char: ord(char) == argument
    if operation is _is.NOT_LITERAL:
        return lambda char: ord(char) != argument
    if operation is _is.ANY:
        return lambda char: char != "\n"
    if operation is _is.CATEGORY:
        return _CATEGORIES[argument]
    if operation is _is.RANGE:
        low, high = argument
        return lambda char: low <= ord(char) <= high
    if operation is _is.IN:
        is_negated = argument[0][0] is _is.NEGATE
        tests = [_character(*each) for each in argument[is_negated:]]
        return lambda char: any(test(char) for test in tests) != is_negated
    raise _TooMuchError(f"has {str(operation).lower()}, which no automaton does")
