"""What may be done with a question that is shown, and the choices that it means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from personalized_soups.declare.evidence import Choice

# A is the answer that is shown first, B the second.
ShownChoice: TypeAlias = Literal["A", "B", "tie", "skip"]
Command: TypeAlias = Literal["A", "B", "tie", "skip", "back", "quit"]


def choice_of(command: ShownChoice, *, swapped: bool) -> Choice:
    """Return the choice between the answers `a` and `b` of a question, for a choice between the shown answers.

    Args:
        command: the choice between the shown answers.
        swapped: whether `b` is shown first.
    """
    match command:
        case "tie" | "skip":
            return command
        case _:
            return "b" if (command == "A") == swapped else "a"


def command_of(choice: Choice, *, swapped: bool) -> ShownChoice:
    """Return the choice between the shown answers for a choice between the answers `a` and `b` of a question."""
    match choice:
        case "tie" | "skip":
            return choice
        case _:
            return "B" if (choice == "a") == swapped else "A"
