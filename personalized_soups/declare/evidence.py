"""What is known of a user, apart from a profile: questions with the user's answers, and texts of the user."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AwareDatetime, Field, model_validator

from personalized_soups.declare.declared import Declared, refusal

Choice: TypeAlias = Literal["a", "b", "tie", "skip"]

Text = Annotated[str, Field(pattern=r"\S")]
QuestionId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class Question(Declared):
    """Two answers to one prompt. A user says which of the two is better.

    Example:
        >>> Question(id="q1", prompt="How do I clean a lamp?", a="Dust it.", b="Happy to help! Dust it.").id
        'q1'
    """

    id: QuestionId = Field(description="The name of the question, which is unique in its pool.")
    prompt: Text = Field(description="The prompt that both answers belong to.")
    a: Text = Field(description="The first answer.")
    b: Text = Field(description="The second answer.")

    @model_validator(mode="after")
    def _check_different(self) -> Question:
        if self.a == self.b:
            raise refusal("both answers are the same text", mend="write two different answers", key=("b",))
        return self


class Answer(Declared):
    """A user's answer to one question.

    Example:
        >>> Answer(question="q1", choice="b").label
        0.0
    """

    question: QuestionId = Field(description="The `id` of the question.")
    choice: Choice = Field(description="The better answer, `tie` if both are equally good, or `skip`.")
    probability: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="The probability that `a` is better, for a judge that is not certain. It replaces `choice`.",
    )
    swapped: bool = Field(
        default=False, description="Whether `b` was shown first. It detects users who always choose one position."
    )
    answered_at: AwareDatetime | None = Field(default=None, description="The time of the answer.")

    @property
    def label(self) -> float | None:
        """The probability that `a` is better: 1 for `a`, 0 for `b`, 0.5 for a tie, and None for a skip."""
        if self.choice == "skip":
            return None
        if self.probability is not None:
            return self.probability
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[self.choice]


class Example(Declared):
    """A prompt with a text that the user wrote or accepted. A user's history is a sequence of examples.

    Example:
        >>> Example(prompt="How do I clean a lamp?", text="Wipe the dust off with a rag.").text
        'Wipe the dust off with a rag.'
    """

    prompt: Text
    text: Text = Field(description="The text that the user wrote or accepted.")


class AnsweredQuestion(Declared):
    """A question with the user's answer. It is stored whole, so the weights can be estimated again with other experts.

    Example:
        >>> question = Question(id="q1", prompt="How do I clean a lamp?", a="Dust it.", b="Happy to help! Dust it.")
        >>> AnsweredQuestion(question=question, answer=Answer(question="q1", choice="b")).answer.choice
        'b'
    """

    question: Question
    answer: Answer

    @model_validator(mode="after")
    def _check_same(self) -> AnsweredQuestion:
        if self.question.id != self.answer.question:
            raise refusal(
                f"the answer is to the question {self.answer.question!r}, but the question is {self.question.id!r}",
                mend="give each question its own answer",
                key=("answer", "question"),
            )
        return self


class UserAnswers(Declared):
    """All answers of one user: a line of an exported file of profiles with answers.

    Example:
        >>> question = Question(id="q1", prompt="How do I clean a lamp?", a="Dust it.", b="Happy to help! Dust it.")
        >>> answered = AnsweredQuestion(question=question, answer=Answer(question="q1", choice="b"))
        >>> UserAnswers(user="ada", answers=(answered,)).user
        'ada'
    """

    user: Text = Field(description="The user's name in the store.")
    answers: tuple[AnsweredQuestion, ...] = Field(description="The answers, with the oldest first.")

    @model_validator(mode="after")
    def _check_unique(self) -> UserAnswers:
        if not self.answers:
            raise refusal("the list of answers is empty", mend="remove the line", key=("answers",))
        places: dict[str, int] = {}
        for place, answered in enumerate(self.answers):
            if (first := places.setdefault(answered.question.id, place)) != place:
                raise refusal(
                    f"answers {first + 1} and {place + 1} are to the same question {answered.question.id!r}",
                    mend="keep one answer to each question",
                    key=("answers", place, "question", "id"),
                )
        return self
