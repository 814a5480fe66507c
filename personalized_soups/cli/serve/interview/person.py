"""A person who answers questions with keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from personalized_soups.cli.serve.interview.screen import HELP, KEYS

if TYPE_CHECKING:
    from personalized_soups.cli.serve.interview.commands import Command
    from personalized_soups.cli.serve.interview.keyboard import Keyboard
    from personalized_soups.users.answers.session import ShownQuestion

_COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "a": "A",
        "b": "B",
        "t": "tie",
        "tie": "tie",
        "s": "skip",
        "skip": "skip",
        "k": "back",
        "back": "back",
        "q": "quit",
        "quit": "quit",
    }
)
_HELP = frozenset({"?", "h", "help"})


@dataclass(frozen=True, slots=True)
class Person:
    """Answers with keys, or with words such as `tie`. Unknown keys are reported, and change nothing.

    Attributes:
        keyboard: what the keys are read from.
        show: prints a text.
    """

    keyboard: Keyboard
    show: Callable[[str], None]

    def command(self, shown: ShownQuestion, *, can_go_back: bool) -> Command | None:
        """Return what the person does with the question. See `Answerer`."""
        self.keyboard.discard()
        while True:
            self.show(f"\n{KEYS}:")
            text = self.keyboard.read()
            if text is None:
                return None
            command = _COMMANDS.get(text)
            if command == "back" and not can_go_back:
                self.show("this is the first question, so there is no answer to take back")
            elif command is not None:
                return command
            elif text in _HELP:
                self.show(HELP)
            elif text:
                self.show(f"{text!r} is not one of the keys")
