"""Bodies of requests and responses about a user's questions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from personalized_soups.serving.protocol.requests import RequestBody
from personalized_soups.users.answers.preferences import Certainty

# A choice between two answers in the order in which they are shown.
ShownChoice: TypeAlias = Literal["first", "second", "tie", "skip"]


class AnswerRequest(RequestBody):
    """The body of POST /v1/profiles/{user}/questions."""

    question: Annotated[str, Field(max_length=64, description="The `id` of the question.")]
    choice: Annotated[
        ShownChoice,
        Field(description="The better answer, `tie` if both are equally good, or `skip`."),
    ]


class QuestionBody(BaseModel):
    """The question that the user should answer next."""

    object: Literal["question"] = "question"
    id: str
    number: int = Field(description="The number of the question in this session, starting at 1.")
    prompt: str
    answers: tuple[str, str] = Field(description="The two answers to the prompt, in the order in which to show them.")


class PreferenceBody(BaseModel):
    """What the answers say of one dimension."""

    dimension: str = Field(description="The dimension; the expert's name if the expert belongs to no dimension.")
    preferred: str = Field(description="The expert that the user prefers.")
    other: str | None = Field(description="The expert of the same dimension that it is compared with.")
    strength: float = Field(description="The difference of the two experts' reward weights.")
    interval: tuple[float, float] = Field(
        description="The interval that holds the difference with probability `level`."
    )
    level: float
    probability: float = Field(description="The probability that the user prefers `preferred` to `other`.")
    certainty: Certainty = Field(description="`clear` from a probability of 0.95, `likely` from 0.8, else `open`.")


class EstimateBody(BaseModel):
    """What is known of the user after the answers so far."""

    num_answers: int = Field(description="The number of answers without skipped questions.")
    preferences: list[PreferenceBody]
    sentence: str = Field(description="The preferences in words, and what is still open.")
    notes: list[str] = Field(description="Warnings about the answers, for example that they contradict each other.")
    agreement: float | None = Field(
        description="How often the estimate is expected to predict the preferred answer of a question that was not "
        "asked. null if all questions were asked."
    )
    profile: dict[str, Any] | None = Field(
        description="The profile that the answers give. null if they show no preference."
    )


class QuestionsState(BaseModel):
    """The next question of a user, and the estimate after the answers so far."""

    object: Literal["questions"] = "questions"
    user: str
    num_answered: int = Field(description="The number of answered and skipped questions.")
    num_questions: int = Field(description="The greatest number of questions that are asked.")
    last_answered: str | None = Field(description="The `id` of the question that was answered last.")
    done: bool = Field(description="Whether enough questions were asked.")
    question: QuestionBody | None = Field(description="The next question; null if `done`.")
    estimate: EstimateBody
