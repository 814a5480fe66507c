"""`psoups profile answers` and `psoups profile expire`: show a user's answers to questions, and delete old answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import JsonOption, StoreOption
from personalized_soups.cli.serve.stored_profiles import DEFAULT_STORE, counted, opened_store, printable

if TYPE_CHECKING:
    from personalized_soups.declare.evidence import AnsweredQuestion

# The length at which a text is cut in the table. `--json` prints whole texts.
_MAX_SHOWN = 60

# Retention times are at most this many days, which is a hundred years.
MAX_DAYS = 36_500


def show_answers(
    user: Annotated[str, typer.Argument(help="The user's name in the store.", show_default=False)],
    *,
    profiles: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Print a user's answers to questions, the oldest first. --json prints whole texts."""
    with opened_store(profiles) as store:
        answers = store.answers.of(user)
    if as_json:
        render.show_json([answered.model_dump(mode="json", exclude_defaults=True) for answered in answers])
    elif answers:
        rows = [_cells(number, answered) for number, answered in enumerate(answers, 1)]
        render.show_table(["", "answered", "choice", "prompt", "better answer"], rows)
    else:
        render.say(f"no answers of {printable(user)} are stored")


def expire_answers(
    *,
    answers_older_than: Annotated[
        float,
        typer.Option(
            min=0,
            max=MAX_DAYS,
            metavar="DAYS",
            help="Delete answers that were given more than DAYS days ago.",
            show_default=False,
        ),
    ],
    profiles: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Delete the old answers of all users to questions. Profiles are kept. This cannot be undone."""
    with opened_store(profiles) as store:
        num_answers = store.answers.expire(datetime.now(UTC) - timedelta(days=answers_older_than))
    if as_json:
        render.show_json({"deleted_answers": num_answers})
    else:
        render.say(f"{counted(num_answers, 'answer')} older than {answers_older_than:g} days deleted")


def _cells(number: int, answered: AnsweredQuestion) -> list[render.Cell]:
    question, answer = answered.question, answered.answer
    time = "" if answer.answered_at is None else answer.answered_at.isoformat(sep=" ", timespec="seconds")
    choice = answer.choice if answer.probability is None else f"a with probability {answer.probability:g}"
    better = {"a": question.a, "b": question.b}.get(choice, "")
    return [number, time, choice, _shortened(question.prompt), _shortened(better)]


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return printable(line if len(line) <= _MAX_SHOWN else f"{line[: _MAX_SHOWN - 3].rstrip()}...")
