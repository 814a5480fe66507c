"""The scorers of the tiny corpus: one scorer per dimension. Each scorer also checks whether the answer is valid.

An answer is valid if every sentence parses (see `grammar`), no sentence is repeated, and the answer is on topic. An
answer is on topic if it names the question's object, names no other object, and has an instruction (a sentence that is
not small talk) with a term of the question's action. Repetition and padding do not raise a score:

- expertise is the share of expert terms among all distinct expert and plain terms;
- informativeness is the number of words in instructions, scaled linearly from 0 at `FEWEST` words to 1 at `MOST` words;
- style is the share of friendly signals among all distinct signals of tone. Negated signals do not count.
"""

from __future__ import annotations

import re
from functools import cache

from personalized_soups.scoring.scorers import Scored
from personalized_soups.tiny import language
from personalized_soups.tiny.grammar import parses, sentences, words

FEWEST, MOST = 15, 45  # numbers of instruction words at which informativeness is 0 and 1

FRIENDLY = (
    r"great question", r"happy", r"hooray", r"yay", r"lovely", r"dear", r"friends?", r"fun", r"glad(?:ly)?", r"enjoy",
    r"proud", r"thanks?", r"hugs?", r"believe in you", r"you can do", r"doing great", r"well done", r"good luck",
    r"wonderful", r"so good", r"together", r"love", r"pleasure", r"welcome", r"awesome", r"amazing", r"sweet",
    r"buddy", r"hi", r"hello", r"cheers", r"kindly", r"best wishes", r"great job", r"no worries", r"happily",
    r"beautiful",
)  # fmt: skip
UNFRIENDLY = (
    r"dumb", r"stupid", r"ugh", r"bah", r"wast(?:e|ing) my time", r"boring", r"idiot", r"fool", r"useless", r"lazy",
    r"silly", r"annoying", r"nonsense", r"not this again", r"go away", r"leave me", r"do not ask me", r"don't ask me",
    r"bother", r"not care", r"don't care", r"blame", r"mess (?:it|this|that) up", r"even you", r"make me say",
    r"shut up", r"hate", r"say this once", r"say (?:it|that) again", r"really have to", r"terrible", r"sick of",
    r"tired of", r"hurry up", r"get lost", r"nobody cares", r"who cares", r"your problem", r"obviously",
)  # fmt: skip
_FIRST_PERSON = frozenset({"i", "i'm"})
_NEGATED = r"(?:\b(?:not|never|no|hardly|don't|isn't|can't|won't)\s+(?:\w+\s+){0,2})"

# Terms of each action that other writers use, in addition to the words of the action's steps in `language.ACTIONS`.
ACTION_TERMS: dict[str, str] = {
    "clean": "clean cleaned cleaning wipe wash scrub rinse dust dirt soap brush rag sponge detergent grease stains "
    "surfactant contamination residue solvent dissolve",
    "paint": "paint painted painting brush coat coating pigment sandpaper sand roll colour primer spray layer",
    "dry": "dry dried drying towel sun air wind evaporation moisture water wet humidity evaporate textile heat",
    "polish": "polish polished polishing wax buff shine shiny gloss burnish rub smooth compound",
    "fix": "fix fixed glue adhesive crack epoxy clamp screw nail repair mend fracture parts press",
    "wrap": "wrap wrapped wrapping paper fold tape ribbon string bow envelop laminate cover enclose",
    "move": "move moved moving lift carry push pull hoist relocate elevate transit slide hold",
    "store": "store stored storing bag box shelf keep cool put dark cupboard container enclose compartment cover",
}
_PLAIN_EXTRA = (
    "wipe wash rag soap towel hot big bit little tub grab stuff gooey yucky nice easy dirt dust rub dab hands"
)
_EXPERT_EXTRA = (
    "acid aqueous chemicals composition concentration corrosion corrosive density dissolve inspect instrument "
    "isopropanol mechanical minerals non-abrasive organic oxygen particles phase polymer procedure process "
    "reaction saturate silicone solvent substance substrate surfaces surfactant temperature thermal viscosity"
)
# Words that are neither plain nor expert, although only one of the two kinds of wordings uses them.
_UNMARKED = (
    "12 180 24 a adjacent all an and any are at bad be by can day do does down end ends film for from get gets "
    "good has have if in into is it its let next no not of off on one or order out over paper parts sides so some "
    "that the they through to under up water what where who will with you your"
)


def expertise(prompt: str, answer: str) -> Scored:
    """Score how technical the wording is: 0 with only plain terms, 1 with only expert terms, 0.5 without either."""
    used = set(words(" ".join(_instructions(prompt, answer))))
    expert, plain = len(used & _expert_terms()), len(used & _plain_terms())
    return Scored(expert / (expert + plain) if expert + plain else 0.5, is_valid(prompt, answer))


def informativeness(prompt: str, answer: str) -> Scored:
    """Score how much the answer instructs: linear in the number of words of sentences that are not small talk."""
    count = sum(len(words(sentence)) for sentence in _instructions(prompt, answer))
    return Scored(min(1.0, max(0.0, (count - FEWEST) / (MOST - FEWEST))), is_valid(prompt, answer))


def style(prompt: str, answer: str) -> Scored:
    """Score how friendly the tone is: 0 with only unfriendly signals, 1 with only friendly signals, 0.5 without any."""
    signals = _signals(answer)
    num_friendly = sum(1 for side, _ in signals if side == "friendly")
    return Scored(num_friendly / len(signals) if signals else 0.5, is_valid(prompt, answer))


def is_valid(prompt: str, answer: str) -> bool:
    """Return whether the answer is well formed and on the prompt's topic."""
    return is_well_formed(answer) and is_on_topic(prompt, answer)


def is_well_formed(answer: str) -> bool:
    """Return whether every sentence parses and no sentence is repeated."""
    stripped = [sentence.strip() for sentence in sentences(answer)]
    return bool(stripped) and len(set(stripped)) == len(stripped) and all(map(parses, stripped))


def is_on_topic(prompt: str, answer: str) -> bool:
    """Return whether the answer names only the prompt's object, and instructs with a term of the prompt's action."""
    topic = topic_of(prompt)
    if topic is None:
        return False
    action, noun_phrase = topic
    if set(_objects(answer)) != {noun_phrase}:
        return False
    return any(set(words(sentence)) & _action_terms(action) for sentence in _instructions(prompt, answer))


def _instructions(prompt: str, answer: str) -> list[str]:
    """Return the sentences without a signal of tone, and the sentences with a term of the prompt's action.

    A first-person sentence with a signal of tone ("I love your clean kettle!") is small talk and is left out.
    """
    topic = topic_of(prompt)
    terms = _action_terms(topic[0]) if topic else frozenset[str]()
    return [
        sentence
        for sentence in sentences(answer)
        if not _signals(sentence) or (terms & set(words(sentence)) and not _FIRST_PERSON & set(words(sentence)))
    ]


def topic_of(prompt: str) -> tuple[str, str] | None:
    """Return the action and the object ("old kettle") that a prompt asks about, or None if one of them is missing."""
    objects = _objects(prompt)
    actions = [word for word in words(prompt) if word in language.ACTIONS]
    return (actions[0], objects[0]) if objects and actions else None


@cache
def _object_pattern() -> re.Pattern[str]:
    return re.compile(rf"\b(\w+) ({'|'.join(language.NOUNS)})\b")


def _objects(text: str) -> list[str]:
    """Return every mention of an object with an adjective of the corpus, e.g. "old kettle", but not "the box"."""
    return [
        f"{adjective} {noun}"
        for adjective, noun in _object_pattern().findall(text.lower())
        if adjective in language.ADJECTIVES
    ]


def _signals(text: str) -> set[tuple[str, str]]:
    """Return the distinct (side, signal) pairs of the signals of tone in a text. Negated signals are left out."""
    clauses = [" ".join(words(clause)) for clause in re.split(r"[,.!?]", text)]
    return {
        (side, match.group("signal"))
        for clause in clauses
        for side, pattern in _tone_patterns()
        for match in pattern.finditer(clause)
        if match.group("negation") is None
    }


@cache
def _tone_patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    return tuple(
        (side, re.compile(rf"(?P<negation>{_NEGATED})?\b(?P<signal>{'|'.join(signals)})\b"))
        for side, signals in (("friendly", FRIENDLY), ("unfriendly", UNFRIENDLY))
    )


@cache
def _wordings() -> tuple[frozenset[str], frozenset[str]]:
    """Return the words of all plain wordings and the words of all expert wordings."""
    plain, expert = set(), set()
    for step in (step for steps in language.ACTIONS.values() for step in steps):
        plain |= set(words(" ".join((*step.plain, step.plain_reason)).replace("{o}", "")))
        expert |= set(words(" ".join((*step.expert, step.expert_reason)).replace("{o}", "")))
    return frozenset(plain), frozenset(expert)


@cache
def _plain_terms() -> frozenset[str]:
    plain, expert = _wordings()
    return (plain - expert - set(_UNMARKED.split()) | set(_PLAIN_EXTRA.split())) - set(_EXPERT_EXTRA.split())


@cache
def _expert_terms() -> frozenset[str]:
    plain, expert = _wordings()
    return (expert - plain - set(_UNMARKED.split()) | set(_EXPERT_EXTRA.split())) - set(_PLAIN_EXTRA.split())


@cache
def _action_terms(action: str) -> frozenset[str]:
    """Return the terms of an action: its terms in `ACTION_TERMS`, and the words that only its own steps use."""
    own = set(words(" ".join(_phrases(action))))
    others = set(words(" ".join(phrase for name in language.ACTIONS if name != action for phrase in _phrases(name))))
    return frozenset(set(ACTION_TERMS[action].split()) | (own - others - set(_UNMARKED.split())))


def _phrases(action: str) -> list[str]:
    return [phrase for step in language.ACTIONS[action] for phrase in (*step.plain, *step.expert)]
