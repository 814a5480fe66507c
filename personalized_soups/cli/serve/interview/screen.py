"""The texts of an interview: a question with its two answers, the help, and what is known so far. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING
from unicodedata import category

if TYPE_CHECKING:
    from rich.console import RenderableType

    from personalized_soups.users.answers.preferences import Preference
    from personalized_soups.users.answers.session import ShownQuestion

# From this width of the terminal on, the two answers are shown side by side. Wider lines are hard to read.
SIDE_BY_SIDE = 100
_WIDEST = 160
_WIDEST_TEXT = 100

KEYS = "A or B, T (tie), S (skip), K (back), Q (quit), ? (help)"

HELP = """\
A  answer A is better
B  answer B is better
T  both are equally good
S  skip the question; it counts as asked
K  take back the last answer
Q  quit; your answers are kept
?  show this help

No answer is right or wrong: choose the one that you would
rather get. If nothing happens, press Enter after the key."""


def question_text(shown: ShownQuestion, *, number: int, total: str, width: int) -> str:
    """Return a question with its answers: side by side in a wide terminal, else one above the other.

    Args:
        shown: the question. If it is swapped, `b` is shown first, as A.
        number: the number of the question, from 1.
        total: the number of questions in words, such as `10` or `at most 10`.
        width: the width of the terminal, in cells.
    """
    question = shown.question
    first, second = (question.b, question.a) if shown.swapped else (question.a, question.b)
    width = min(width, _WIDEST)
    text = min(width, _WIDEST_TEXT)
    head = f"question {number} of {total}\n\n{_drawn(_plain(question.prompt), text)}\n\n"
    if width >= SIDE_BY_SIDE:
        return head + _drawn(_columns(first, second), width)
    parts = [f"{name} {'-' * (text - 2)}\n{_drawn(_plain(answer), text)}" for name, answer in _named(first, second)]
    return head + "\n\n".join(parts)


def so_far_text(preferences: Sequence[Preference], agreement: float) -> str:
    """Return one line that says which preferences are clear, likely and open, and how well choices can be guessed.

    Args:
        preferences: the preference in each dimension.
        agreement: the expected share of right guesses, or NaN if no question is left.
    """
    clear = [each.preferred for each in preferences if each.certainty == "clear"]
    likely = [each.preferred for each in preferences if each.certainty == "likely"]
    still_open = [each.dimension for each in preferences if each.certainty == "open"]
    kinds = {"clear": clear, "likely": likely, "open": still_open}
    parts = [f"{kind}: {', '.join(map(_clean, names))}" for kind, names in kinds.items() if names]
    guess = guess_text(agreement)
    return f"so far  {'; '.join(parts)}" + (f"  ({guess})" if guess else "")


def guess_text(agreement: float) -> str:
    """Return how many of ten choices would be guessed right, in words. It is empty for NaN.

    Example:
        >>> guess_text(0.83)
        'I would guess 8 of 10 of your choices'
    """
    if math.isnan(agreement):  # no question is left on which a guess could be tried
        return ""
    right = round(10 * agreement)
    # "10 of 10" would promise certainty, which an estimate never has
    return f"I would guess {'more than 9' if right == 10 else right} of 10 of your choices"


def _named(first: str, second: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("A", first), ("B", second)


def _columns(first: str, second: str) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2), expand=True)
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(*(_titled(name) for name, _ in _named(first, second)))
    table.add_row(_plain(first), _plain(second))
    return table


def _titled(name: str) -> RenderableType:
    from rich.rule import Rule

    return Rule(name, align="left", characters="-", style="none")


def _plain(text: str) -> RenderableType:
    from rich.text import Text

    return Text(_clean(text.strip()), overflow="fold")


def _clean(text: str) -> str:
    """Return the text without control characters, which a terminal would execute. Line breaks and tabs are kept."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if category(letter) in {"Cc", "Cs"} and letter not in "\n\t" else letter
        for letter in text
    )


def _drawn(renderable: RenderableType, width: int) -> str:
    from rich.console import Console

    file = StringIO()
    Console(file=file, width=width, color_system=None, markup=False, highlight=False, emoji=False).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))
