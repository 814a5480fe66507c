"""The SQL statements that write the staged profiles and answers of an import."""

from __future__ import annotations

from sqlalchemy import BigInteger, bindparam, func, insert, select, update

from personalized_soups.users.profiles.schema import answers, profiles, staged, staged_answers, store

_NOW = bindparam("now", type_=BigInteger)

_later = profiles.alias("later")
_last = select(func.max(_later.c.version)).where(_later.c.user == staged.c.user).correlate(staged).scalar_subquery()
# Every staged profile that differs from the user's current profile becomes the user's next version.
ADD_STAGED = (
    insert(profiles)
    .from_select(
        ["user", "version", "document", "written_at"],
        select(
            staged.c.user,
            func.coalesce(profiles.c.version, select(store.c.retired).scalar_subquery()) + 1,
            staged.c.document,
            _NOW,
        )
        .select_from(staged.outerjoin(profiles, (profiles.c.user == staged.c.user) & (profiles.c.version == _last)))
        .where(profiles.c.document.is_distinct_from(staged.c.document))
        .order_by(staged.c.user),
    )
    .execution_options(preserve_rowcount=True)
)

_same_question = (answers.c.user == staged_answers.c.user) & (answers.c.question == staged_answers.c.question)

# The staged answers to questions that the user has answered otherwise.
DIFFERING_ANSWERS = (
    select(staged_answers.c.user, staged_answers.c.question)
    .join(answers, _same_question)
    .where(answers.c.document != staged_answers.c.document)
    .order_by(staged_answers.c.user, staged_answers.c.position)
)

_replacing = (
    select(staged_answers).where(_same_question, answers.c.document != staged_answers.c.document).correlate(answers)
)
# A replaced answer keeps its place in the order.
REPLACE_STAGED_ANSWERS = (
    update(answers)
    .where(_replacing.exists())
    .values(
        document=_replacing.with_only_columns(staged_answers.c.document).scalar_subquery(),
        answered_at=_replacing.with_only_columns(staged_answers.c.answered_at).scalar_subquery(),
    )
)

_others = answers.alias("others")
_last_number = (
    select(func.coalesce(func.max(_others.c.number), 0))
    .where(_others.c.user == staged_answers.c.user)
    .correlate(staged_answers)
    .scalar_subquery()
)
# Every staged answer to a question that the user has not answered follows the user's stored answers.
ADD_STAGED_ANSWERS = (
    insert(answers)
    .from_select(
        ["user", "question", "number", "document", "answered_at"],
        select(
            staged_answers.c.user,
            staged_answers.c.question,
            _last_number + staged_answers.c.position,
            staged_answers.c.document,
            staged_answers.c.answered_at,
        )
        .select_from(staged_answers.outerjoin(answers, _same_question))
        .where(answers.c.user.is_(None))
        .order_by(staged_answers.c.user, staged_answers.c.position),
    )
    .execution_options(preserve_rowcount=True)
)
