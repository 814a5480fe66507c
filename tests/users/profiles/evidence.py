"""Answered questions for the tests of the answer store."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from personalized_soups.declare.evidence import Answer, AnsweredQuestion, Choice, Question


def answered(question: str, choice: Choice = "a", **fields: Any) -> AnsweredQuestion:
    """Return an answer to a question whose texts contain its id. `fields` are fields of the answer."""
    return AnsweredQuestion(
        question=Question(id=question, prompt=f"the prompt of {question}", a=f"{question} one", b=f"{question} two"),
        answer=Answer(question=question, choice=choice, **fields),
    )


def timeless(given: AnsweredQuestion) -> AnsweredQuestion:
    """Return the answer without its time."""
    return given.replaced(answer=given.answer.model_copy(update={"answered_at": None}))


def time_of(given: AnsweredQuestion) -> datetime:
    """Return the time of the answer."""
    assert given.answer.answered_at is not None
    return given.answer.answered_at
