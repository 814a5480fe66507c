"""Match module names with the keys of rank_pattern and alpha_pattern in bounded time. The keys are regular expressions.

PEFT calls `re.match(rf"(.*\\.)?({key})$", module)` for each key (peft.utils.other.get_pattern_key). Python's matcher
backtracks, so a malicious adapter with a key such as `(a+)+$` could keep it busy for years. This module parses the
expression with Python's parser and runs it as a finite automaton (Thompson, CACM 11(6), 1968), which takes one step per
character. It rejects large expressions and features that an automaton cannot match: references to groups, lookahead and
lookbehind.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

# Python's own parser of regular expressions, and the constants in its results.
_parser: Any = importlib.import_module("re._parser")
_is: Any = importlib.import_module("re._constants")

# Most keys are a module's name or the end of one. For such keys, Python's matcher needs at most len(key) * len(module)
# steps, so no automaton is needed.
_NAME = re.compile(r"\^?(?:[\w\-]|\\?\.)+\$?")

_MAX_KEY = 1000
_MAX_STATES = 2000
# The maximum sum of states times characters, over all keys and modules of an adapter. It takes at most a minute. An
# adapter with 10,000 modules and ten expressions of twenty states needs a tenth of it.
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
    """The keys of rank_pattern or alpha_pattern, in the order of the file.

    Raises:
        ValueError: if a key is not a valid regular expression or cannot be matched in bounded time. The error names the
            first such key.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._matchers = [(key, _matcher(key)) for key in keys]
        self._steps_left = _MAX_STEPS

    def first(self, module: str) -> str | None:
        """Return the first key that matches a module's name, or None if no key matches.

        Raises:
            ValueError: if all calls so far together took more steps than a normal adapter needs.
        """
        for key, matcher in self._matchers:
            self._steps_left -= len(module) * len(matcher.states) if isinstance(matcher, _Automaton) else 1
            if self._steps_left < 0:
                raise ValueError(f"matching {key[:80]!r} and the other keys with all module names takes too long")
            if matcher.match(module):
                return key
        return None


def _matcher(key: str) -> _Automaton | re.Pattern[str]:
    expression = rf"(.*\.)?({key})$"
    if _NAME.fullmatch(key):
        return re.compile(expression)
    if len(key) > _MAX_KEY:
        raise ValueError(
            f"the regular expression {key[:80]!r}... has {len(key)} characters, but at most {_MAX_KEY} are allowed"
        )
    try:
        return _Automaton(_parser.parse(expression))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key[:80]!r} is not a valid regular expression: {error}") from None
    except _TooMuchError as error:
        raise ValueError(f"the regular expression {key[:80]!r} {error}") from None


class _TooMuchError(Exception):
    """A small automaton cannot match the expression. The message says why."""


class _Automaton:
    """A nondeterministic finite automaton.

    A state is a tuple of a test of the next character, a test of the position in the text, and the numbers of the
    following states. A state without a character test consumes no character.
    """

    def __init__(self, parsed: Any) -> None:
        if parsed.state.flags & ~re.UNICODE.value:
            raise _TooMuchError("sets flags, which is not supported")
        self.states: list[tuple[Callable[[str], bool] | None, Callable[[int, str], bool] | None, list[int]]] = []
        self._end = self._state()
        self._start = self._sequence(parsed, self._end)

    def match(self, text: str) -> bool:
        """Return whether `re.match(expression, text)` would find a match."""
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
        """Return the given states and all states that are reached from them without consuming a character."""
        reached: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            if number in reached:
                continue
            reached.add(number)
            test, place_test, following = self.states[number]
            if test is None and (place_test is None or place_test(place, text)):
                waiting += following
        return reached

    def _state(
        self,
        *following: int,
        test: Callable[[str], bool] | None = None,
        place_test: Callable[[int, str], bool] | None = None,
    ) -> int:
        if len(self.states) == _MAX_STATES:
            raise _TooMuchError(f"needs more than {_MAX_STATES} states of an automaton")
        self.states.append((test, place_test, list(following)))
        return len(self.states) - 1

    def _sequence(self, parsed: Any, after: int) -> int:
        for operation, argument in reversed(list(parsed)):
            after = self._node(operation, argument, after)
        return after

    def _node(self, operation: Any, argument: Any, after: int) -> int:
        """Add the states of a node of the parsed expression, which lead to `after`, and return the first of them."""
        if operation is _is.BRANCH:
            return self._state(*(self._sequence(branch, after) for branch in argument[1]))
        if operation is _is.SUBPATTERN:
            _, added, removed, inner = argument
            if added or removed:
                raise _TooMuchError("sets flags, which is not supported")
            return self._sequence(inner, after)
        if operation in {_is.MAX_REPEAT, _is.MIN_REPEAT}:  # greediness does not affect whether there is a match
            return self._repeated(*argument, after=after)
        if operation is _is.AT:
            return self._state(after, place_test=_place(argument))
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
    if code is _is.AT_END:  # also before a final newline
        return lambda place, text: place == len(text) or (place == len(text) - 1 and text.endswith("\n"))
    if code is _is.AT_END_STRING:
        return lambda place, text: place == len(text)
    raise _TooMuchError(f"has {str(code).lower()}, which is not supported")


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
    raise _TooMuchError(f"has {str(operation).lower()}, which is not supported")
