"""A synthetic corpus of questions and answers that vary independently in three preference dimensions.

The same seed gives the same bytes on every machine (Python's own random generator, no sets). A topic is an action on an
object. The objects are split into seen, validation and held-out objects, so that an evaluation never asks about an
object that the base or an expert was trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from personalized_soups.tiny import language

Split = Literal["seen", "validation", "held-out"]
Level = Literal["low", "mixed", "high"]
DIMENSIONS: dict[str, tuple[str, str]] = {
    "expertise": ("elementary", "expert"),
    "informativeness": ("concise", "informative"),
    "style": ("unfriendly", "friendly"),
}  # each dimension's low and high side
MIXED_SHARE = 0.1  # share of mixed levels in each dimension
# Sampling at a temperature below 1 favours the likelier wording, so equal shares would not give balanced answers. These
# shares balance the base's answers at temperature 0.7 (measured on validation topics).
HIGH_SHARE = {"expertise": 0.51, "informativeness": 0.41, "style": 0.47}
INSTRUCTED_SHARE = 0.4  # share of questions that state preferences
OBEYED_SHARE = 0.9  # share of stated preferences that are not reversed


@dataclass(frozen=True, slots=True, order=True)
class Topic:
    """The topic of a question: an action on an object, e.g. clean / old / kettle."""

    action: str  # a verb of language.ACTIONS
    adjective: str  # the object's adjective
    noun: str  # the object

    @property
    def object(self) -> str:
        """The object with its adjective: "old kettle"."""
        return f"{self.adjective} {self.noun}"

    @property
    def split(self) -> Split:
        """The split of the object, chosen by a hash: about 4 of 6 objects are seen, 1 validation and 1 held-out."""
        bucket = hashlib.sha256(self.object.encode()).digest()[0] % 6
        return "held-out" if bucket == 0 else "validation" if bucket == 1 else "seen"


@dataclass(frozen=True, slots=True)
class Document:
    """One question and its answer."""

    prompt: str  # the question
    answer: str  # the answer
    topic: Topic  # the topic of the question and the answer
    levels: dict[str, Level]  # dimension -> level of the answer


def topics(split: Split) -> list[Topic]:
    """Return every topic of a split, in a fixed order."""
    every = (Topic(a, j, n) for j in language.ADJECTIVES for n in language.NOUNS for a in language.ACTIONS)
    return [topic for topic in every if topic.split == split]


def question(topic: Topic, rng: random.Random) -> str:
    """Return a question about `topic`, in one of several wordings."""
    article = "an" if topic.adjective[0] in "aeiou" else "a"
    return rng.choice(language.QUESTIONS).format(a=topic.action, o=f"{article} {topic.object}")


def prompts(split: Split, count: int, seed: int) -> list[str]:
    """Return `count` questions without instructions, on distinct topics of `split`, balanced over actions.

    Raises:
        ValueError: if the split has fewer than `count` topics.
    """
    rng = random.Random(f"prompts/{split}/{seed}")
    pool = topics(split)
    if count > len(pool):
        raise ValueError(f"cannot return {count} prompts: the split {split!r} has {len(pool)} topics")
    by_action: dict[str, list[Topic]] = {action: [] for action in language.ACTIONS}
    for topic in rng.sample(pool, len(pool)):
        by_action[topic.action].append(topic)
    turns = [topic for row in zip(*by_action.values(), strict=False) for topic in row]
    turns += [topic for topic in pool if topic not in set(turns)]
    return [question(topic, rng) for topic in turns[:count]]


def document(topic: Topic, rng: random.Random) -> Document:
    """Return a question on `topic` and an answer, whose levels are drawn independently.

    Some questions also state preferences, which most answers follow.
    """
    levels: dict[str, Level] = {name: _level(name, rng) for name in DIMENSIONS}
    prompt = question(topic, rng)
    if rng.random() < INSTRUCTED_SHARE:
        prompt = " ".join([prompt, *_instructions(levels, rng)])
    return Document(prompt, _answer(topic, levels, rng), topic, levels)


def documents(count: int, seed: int) -> Iterator[Document]:
    """Yield `count` documents on seen topics."""
    rng = random.Random(f"corpus/{seed}")
    pool = topics("seen")
    for _ in range(count):
        yield document(rng.choice(pool), rng)


def _level(dimension: str, rng: random.Random) -> Level:
    if rng.random() < MIXED_SHARE:
        return "mixed"
    return "high" if rng.random() < HIGH_SHARE[dimension] else "low"


def _instructions(levels: dict[str, Level], rng: random.Random) -> list[str]:
    """Return one to three sentences that state preferences. Most of the preferences match `levels`."""
    names = rng.sample(list(DIMENSIONS), rng.choice((1, 1, 2, 3)))
    instructions = []
    for name in names:
        low, high = DIMENSIONS[name]
        side = {"low": low, "high": high, "mixed": rng.choice((low, high))}[levels[name]]
        if rng.random() > OBEYED_SHARE:
            side = low if side == high else high
        instructions.append(rng.choice(language.INSTRUCTIONS[side]))
    return instructions


def _answer(topic: Topic, levels: dict[str, Level], rng: random.Random) -> str:
    steps = _steps(topic, levels, rng)
    long = levels["informativeness"] == "high"
    opener, remark, closer = _style(levels["style"], rng)
    if remark and long and rng.random() < 0.5:
        steps.insert(rng.randrange(1, len(steps)), remark)
    if levels["informativeness"] == "low" and opener and closer:  # a concise answer has one of the two
        opener, closer = rng.choice(((opener, ""), ("", closer)))
    return " ".join(part for part in (opener, *steps, closer) if part).format(o=topic.object)


def _steps(topic: Topic, levels: dict[str, Level], rng: random.Random) -> list[str]:
    every = language.ACTIONS[topic.action]
    count = {"low": rng.choice((1, 1, 2)), "mixed": rng.choice((2, 3)), "high": rng.choice((4, 5))}[
        levels["informativeness"]
    ]
    others = [position for position in range(len(every)) if position != language.ESSENTIAL]
    chosen = sorted([language.ESSENTIAL, *rng.sample(others, count - 1)])
    reason_share = {"low": 0.0, "mixed": 0.3, "high": 0.6}[levels["informativeness"]]
    sentences = []
    for turn, position in enumerate(chosen):
        step = every[position]
        expert = rng.random() < {"low": 0.0, "mixed": 0.5, "high": 1.0}[levels["expertise"]]
        sentence = rng.choice(step.expert if expert else step.plain)
        if rng.random() < reason_share:
            sentence += f" in order to {step.expert_reason}" if expert else f" so that {step.plain_reason}"
        sentences.append(_connect(sentence, turn, count))
    return sentences


def _connect(sentence: str, turn: int, count: int) -> str:
    """Return the step as a sentence. In answers of three or more steps it begins with a connective ("first", ...)."""
    if count < 3:
        return sentence[0].upper() + sentence[1:] + "."
    last = len(language.CONNECTIVES) - 1
    return f"{language.CONNECTIVES[last if turn == count - 1 else turn]} {sentence}."


def _style(level: Level, rng: random.Random) -> tuple[str, str, str]:
    """Return an opener, a remark and a closer. A mixed answer has one friendly and one unfriendly part, or neither."""
    friendly = tuple(
        rng.choice(p) for p in (language.FRIENDLY_OPENERS, language.FRIENDLY_REMARKS, language.FRIENDLY_CLOSERS)
    )
    unfriendly = tuple(
        rng.choice(p) for p in (language.UNFRIENDLY_OPENERS, language.UNFRIENDLY_REMARKS, language.UNFRIENDLY_CLOSERS)
    )
    if level == "high":
        return friendly[0], friendly[1], friendly[2]
    if level == "low":
        return unfriendly[0], unfriendly[1], unfriendly[2]
    return rng.choice((("", "", ""), (friendly[0], "", unfriendly[2]), (unfriendly[0], "", friendly[2])))
