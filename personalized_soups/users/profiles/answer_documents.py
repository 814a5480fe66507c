"""Conversion between answered questions and the documents in a store.

A document is a JSON object in ASCII. It does not contain the time of the answer, which has its own column. So two
documents are equal if the questions and the answers are equal, whenever they were given.
"""

from __future__ import annotations

import json
from datetime import datetime

from pydantic import ValidationError

from personalized_soups.declare.evidence import AnsweredQuestion
from personalized_soups.errors import DeclarationError, FileFormatError
from personalized_soups.users.profiles.names import has_surrogates


def document_of_answer(answered: AnsweredQuestion) -> str:
    """Return the document of an answered question.

    Raises:
        DeclarationError: if a text contains lone surrogates.
    """
    question = answered.question
    for name in ("prompt", "a", "b"):
        if has_surrogates(getattr(question, name)):
            raise DeclarationError(
                f"`{name}` of the question {question.id!r} is not Unicode text: it contains half of a surrogate pair",
                where=question.place(name),
                mend="decode the text as UTF-8",
            )
    fields = answered.model_dump(exclude_defaults=True, exclude={"answer": {"answered_at"}})
    return json.dumps(fields, separators=(",", ":"))


def answer_of_document(user: str, document: str, answered_at: datetime, where: str) -> AnsweredQuestion:
    """Return the answered question in a document.

    Args:
        user: the user who gave the answer, for errors.
        document: the document, as `document_of_answer` returned it.
        answered_at: the time of the answer.
        where: the store's name, for errors.

    Raises:
        FileFormatError: if the document is not a valid answered question. The error does not contain its texts.
    """
    try:
        answered = AnsweredQuestion.model_validate_json(document)
    except ValidationError:
        # not `from error`: pydantic's error contains the texts, and a server would write them to its log
        raise FileFormatError(
            f"an answer of {user!r} is not a valid answered question",
            where=where,
            mend="upgrade personalized_soups if a newer version wrote the answer, else delete the user's answers",
        ) from None
    # this does not validate again: a stored time is always valid
    return answered.model_copy(update={"answer": answered.answer.model_copy(update={"answered_at": answered_at})})
