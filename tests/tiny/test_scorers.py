"""The tiny world's scorers on sentences by a person: ordinary sentences, and sentences written to fool the scorers."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from personalized_soups.tiny import corpus, scorers
from personalized_soups.tiny.grammar import parses, sentences, words

CLEAN = "How do I clean an old kettle?"
POLISH = "Tell me how to polish a copper lamp."
MOVE = "Can you help me move a heavy desk?"

PLAIN = [
    (CLEAN, "Fill the old kettle with hot water and a bit of soap. Then wipe it with a rag."),
    (CLEAN, "Rub the dirt off the old kettle with a soft towel."),
    (POLISH, "Dust the copper lamp. Then rub a little wax on it with your hands."),
]
EXPERT = [
    (
        CLEAN,
        "Dissolve the mineral scale in the old kettle with a dilute organic acid. Then inspect the interior surfaces.",
    ),
    (CLEAN, "Treat the old kettle with an aqueous surfactant to reduce the residue."),
    (POLISH, "Apply a thin polymer emulsion to the copper lamp to prevent corrosion of the substrate."),
]
CONCISE = [
    (CLEAN, "Wash the old kettle with soap."),
    (MOVE, "Lift the heavy desk with two friends, please."),
]
INFORMATIVE = [
    (
        CLEAN,
        "First, fill the old kettle with warm water and a spoon of soap. Then leave it for one hour so that the "
        "dirt gets "
        "loose. After that, scrub the inside with a soft brush until all the stains are gone. Last, rinse it twice "
        "and rub "
        "it dry with a towel.",
    ),
    (
        MOVE,
        "First, measure the door so that you know the heavy desk will fit through it. Then empty it and take the "
        "lamp off "
        "the top. Next, ask one more person to lift the other side with you. Last, set it down slowly so that the "
        "floor is "
        "safe.",
    ),
]
FRIENDLY = [
    (CLEAN, "What a wonderful idea, my dear friend! Wash the old kettle with soap. I love your kettle!"),
    (POLISH, "Thanks for asking! Rub wax on the copper lamp and enjoy the shine."),
]
UNFRIENDLY = [
    (CLEAN, "Wash the old kettle, you lazy fool. Do not bother me again."),
    (POLISH, "What a stupid thing to ask. Rub wax on the copper lamp and leave me alone."),
]
BROKEN = {
    "non-words": (CLEAN, "Wash the old kettlish with surfactow."),
    "word salad": (CLEAN, "Kettle the old rub with in soap."),
    "marker salad": (CLEAN, "Old kettle surfactant the deionised of aqueous emulsify with."),
    "said twice": (CLEAN, "Wash the old kettle with soap. Wash the old kettle with soap."),
    "stutter": (CLEAN, "Wash the old kettle with soap soap."),
    "no end": (CLEAN, "Wash the old kettle with"),
    "no mark at the end": (CLEAN, "Wash the old kettle with soap"),
    "a code fence": (CLEAN, "Wash the old kettle with `soap`."),
    "another object": (CLEAN, "Wash the red bottle with soap."),
    "two objects": (CLEAN, "Wash the old kettle and the red bottle with soap."),
    "half of the object": (CLEAN, "Wash the kettle with soap."),
    "another action": (CLEAN, "Lift the old kettle with your legs."),
    "only small talk": (CLEAN, "Great question, my friend! I love your old kettle!"),
    "nothing": (CLEAN, ""),
    "spaces": (CLEAN, "   "),
}


@pytest.mark.parametrize(("prompt", "answer"), PLAIN + EXPERT + CONCISE + INFORMATIVE + FRIENDLY + UNFRIENDLY)
def test_honest_sentences_are_valid(prompt: str, answer: str) -> None:
    refused = [sentence for sentence in sentences(answer) if not parses(sentence)]
    assert refused == []
    assert scorers.is_valid(prompt, answer)


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_answers_are_invalid_and_suit_no_side(kind: str) -> None:
    prompt, answer = BROKEN[kind]
    for scorer in (scorers.expertise, scorers.informativeness, scorers.style):
        scored = scorer(prompt, answer)
        assert not scored.valid
        assert scored.toward("low") == scored.toward("high") == 0.0


@pytest.mark.parametrize(
    ("scorer", "low", "high"),
    [
        (scorers.expertise, PLAIN, EXPERT),
        (scorers.informativeness, CONCISE, INFORMATIVE),
        (scorers.style, UNFRIENDLY, FRIENDLY),
    ],
)
def test_each_side_stands_on_its_half(scorer: object, low: list[tuple[str, str]], high: list[tuple[str, str]]) -> None:
    assert callable(scorer)
    assert [scorer(prompt, answer).value < 0.5 for prompt, answer in low] == [True] * len(low)
    assert [scorer(prompt, answer).value > 0.5 for prompt, answer in high] == [True] * len(high)


def test_saying_a_term_often_counts_once() -> None:
    once = scorers.expertise(CLEAN, "Wash the old kettle with a surfactant.")
    often = scorers.expertise(CLEAN, "Wash the old kettle with a surfactant, a surfactant and a surfactant.")
    assert once.value == often.value == 0.5  # one plain term (wash), one expert term (surfactant)


def test_small_talk_is_no_information() -> None:
    short = "Wash the old kettle with soap."
    talk = (
        "Hello my dear friend, I am so happy that you asked me this lovely question! It is such fun to do this "
        "together! "
        "Wash the old kettle with soap. Thank you so much, my friend, and enjoy all of your wonderful days!"
    )
    assert scorers.informativeness(CLEAN, talk).value == scorers.informativeness(CLEAN, short).value == 0.0


def test_negated_signals_do_not_count() -> None:
    assert scorers.style(CLEAN, "I am not happy. Wash the old kettle with soap.").value == 0.5
    assert scorers.style(CLEAN, "It is no fun. You are a fool. Wash the old kettle with soap.").value == 0.0
    assert scorers.style(CLEAN, "You are not stupid, my friend. Wash the old kettle with soap.").value == 1.0


def test_a_tone_of_both_kinds_is_in_between() -> None:
    assert scorers.style(CLEAN, "Hello, you fool. Wash the old kettle with soap.").value == 0.5


def test_every_answer_of_the_corpus_is_valid_and_shuffled_ones_are_not() -> None:
    entries = list(islice(corpus.documents(400, seed=11), 400))
    assert [entry.answer for entry in entries if not scorers.is_valid(entry.prompt, entry.answer)] == []
    rng = random.Random(0)
    shuffled = 0
    for entry in entries:
        mixed = words(entry.answer)
        rng.shuffle(mixed)
        shuffled += scorers.is_valid(entry.prompt, " ".join(mixed).capitalize() + ".")
    assert shuffled <= 4  # 1%: a random order of a few words may be a sentence


def test_the_scores_follow_the_levels_and_not_each_other() -> None:
    entries = list(corpus.documents(1000, seed=3))
    values = {
        name: [getattr(scorers, name)(entry.prompt, entry.answer).value for entry in entries]
        for name in corpus.DIMENSIONS
    }
    for name, scores in values.items():
        sure = [
            (s, entry.levels[name]) for s, entry in zip(scores, entries, strict=True) if entry.levels[name] != "mixed"
        ]
        agree = sum((score > 0.5) == (level == "high") for score, level in sure) / len(sure)
        assert agree > 0.95, name
    for first, second in (("expertise", "informativeness"), ("expertise", "style"), ("informativeness", "style")):
        assert abs(_correlation(values[first], values[second])) < 0.12  # 1000 independent draws: 3 sigma is 0.095


def _correlation(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return float(covariance / (sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y)) ** 0.5)
