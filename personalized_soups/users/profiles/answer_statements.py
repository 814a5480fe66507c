"""The SQL statements that use the table of answers."""

from __future__ import annotations

from sqlalchemy import bindparam, delete, func, insert, select, update

from personalized_soups.users.profiles.schema import answers

_of_user = answers.c.user == bindparam("name")
_of_question = _of_user & (answers.c.question == bindparam("of"))

ANSWERS = select(answers).where(_of_user).order_by(answers.c.number)
LAST_ANSWER = select(answers).where(_of_user).order_by(answers.c.number.desc()).limit(1)
ANSWER_TO = select(answers).where(_of_question)
COUNT = select(func.count(), func.coalesce(func.max(answers.c.number), 0)).where(_of_user)
USERS = (
    select(answers.c.user)
    .where(answers.c.user > bindparam("after"))
    .distinct()
    .order_by(answers.c.user)
    .limit(bindparam("limit"))
)
ADD_ANSWER = insert(answers)
REPLACE_ANSWER = (
    update(answers)
    .where(_of_question)
    .values(document=bindparam("new_document"), answered_at=bindparam("new_answered_at"))
)
DELETE_ANSWER = delete(answers).where(_of_question)
DELETE_ANSWERS = delete(answers).where(_of_user)

_old_answers = answers.c.answered_at < bindparam("before")
# The users who have answers that are older than a time.
USERS_BEFORE = select(answers.c.user).where(_old_answers).distinct()
DELETE_ANSWERS_BEFORE = delete(answers).where(_old_answers)
