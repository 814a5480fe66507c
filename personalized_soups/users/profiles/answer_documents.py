"""Conversion between answered questions and the documents in a store.

A document is a JSON object in ASCII. It does not contain the time of the answer, which has its own column. So two
documents are equal if the questions and the answers are equal, whenever they were given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from personalized_soups.declare.evidence import AnsweredQuestion
from personalized_soups.errors import DeclarationError, FileFormatError, UsageError
from personalized_soups.users.profiles.names import has_surrogates

# The maximum size of the document of a session, in bytes.
MAX_SESSION_BYTES = 65_536


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


def document_of_session(session: Mapping[str, Any]) -> str:
    """Return the document of a session.

    Raises:
        UsageError: if the session is not a JSON object, or if it takes more than MAX_SESSION_BYTES bytes.
    """
    try:
        document = json.dumps(dict(session), separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"the session cannot be stored as JSON: {error}",
            where="session",
            mend="give a mapping of texts to numbers, texts, booleans, None, lists and such mappings",
        ) from None
    if len(document) > MAX_SESSION_BYTES:
        raise UsageError(
            f"the session takes {len(document)} bytes, but at most {MAX_SESSION_BYTES} are allowed",
            where="session",
            mend="store the ids of questions, not their texts",
        )
    return document
