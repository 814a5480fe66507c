from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.declare.fluency import FluencyBounds
from personalized_soups.declare.loader import dump, load_text
from personalized_soups.errors import DeclarationError, IncompatibleExpertsError, InputError, UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.scoring.fluency import FluencyGate, MeasuredText, failed_checks
from personalized_soups.scoring.fluency_calibration import calibrate_fluency, num_failed
from personalized_soups.tiny import BASE_FOLDER
from personalized_soups.tiny.corpus import prompts
from tests.conftest import CHAT_TEMPLATE

SOUND = MeasuredText(num_tokens=40, log_prob=-1.5, square=4.0, distinct=1.0, script=1.0, has_words=True, ends=True)
BOUNDS = FluencyBounds(
    typical=-1.5, between_texts=0.3, between_tokens=2.0, max_deviations=2.0, min_distinct=0.8, max_new_tokens=80
)


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, ()),
        ({"log_prob": -1.5 - 2 * np.sqrt(0.09 + 4 / 40) + 1e-9}, ()),
        ({"log_prob": -1.5 - 2 * np.sqrt(0.09 + 4 / 40) - 1e-9}, ("likelihood",)),
        # the same mean is fine for a short answer
        ({"log_prob": -1.5 - 2 * np.sqrt(0.09 + 4 / 40) - 1e-9, "num_tokens": 39}, ()),
        ({"distinct": 0.79}, ("loops",)),
        ({"script": 0.89}, ("script",)),
        ({"ends": False}, ("end",)),
        ({"ends": False, "num_tokens": 72}, ()),  # cut at the limit
        ({"ends": False, "num_tokens": 71}, ("end",)),
        ({"ends": False, "script": 0.0, "distinct": 0.0, "log_prob": -9.0}, ("script", "end", "loops", "likelihood")),
    ],
)
def test_each_check_has_its_bound(change: dict[str, float], failed: tuple[str, ...]) -> None:
    assert failed_checks(SOUND._replace(**change), BOUNDS) == failed  # type: ignore[arg-type]


def test_an_answer_without_words_fails_and_nothing_else_is_asked() -> None:
    assert failed_checks(SOUND._replace(has_words=False, num_tokens=0, log_prob=-99.0), BOUNDS) == ("words",)


def test_without_a_limit_an_answer_may_end_anywhere() -> None:
    assert failed_checks(SOUND._replace(ends=False), BOUNDS.replaced(max_new_tokens=None)) == ()


def test_log_probabilities_are_those_of_the_answer_without_the_end_token(small_base: Path) -> None:
    gate = FluencyGate.open(small_base, device="cpu", batch_size=2)
    items = [
        ("wash", "rub it dry"),
        ("How do I wash?", "With soap and warm water, then rub it."),
        ("wash", "x"),
        ("a", " "),
    ]
    measured = gate.measure([prompt for prompt, _ in items], [answer for _, answer in items])
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    model = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float64)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    for (prompt, answer), got in zip(items[:3], measured, strict=False):
        start = tokenizer(f"<|user|>{prompt}<|assistant|>", add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"<|user|>{prompt}<|assistant|>{answer}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        each = [float(log_probs[place - 1, ids[place]]) for place in range(len(start), len(ids))]
        assert got.num_tokens == len(each)
        # float32 logits of this small model are within 1e-5 of those in float64
        assert got.log_prob == pytest.approx(np.mean(each), abs=1e-4)
        assert got.square == pytest.approx(np.mean(np.square(each)), abs=1e-3)
    assert measured[3] == MeasuredText(0, 0.0, 0.0, 1.0, 1.0, has_words=False, ends=False)


def _drawn(num: int, rng: np.random.Generator, lengths: tuple[int, int]) -> list[MeasuredText]:
    """Draw answers from the random-effects model: texts with the deviation 0.3, tokens with 2.0, the typical -1.5."""
    drawn = []
    for _ in range(num):
        count = int(rng.integers(*lengths))
        tokens = -1.5 + 0.3 * rng.standard_normal() + 2.0 * rng.standard_normal(count)
        drawn.append(SOUND._replace(num_tokens=count, log_prob=float(tokens.mean()), square=float((tokens**2).mean())))
    return drawn


def test_the_calibration_finds_the_deviations_of_texts_and_tokens() -> None:
    bounds = calibrate_fluency(_drawn(4000, np.random.default_rng(0), (20, 90)))
    # Standard errors: .3 / sqrt(4000) for the mean; the relative error of a deviation is about 1 / sqrt(2 * 4000) for
    # texts (times 2.5, as two thirds of the variance of a mean are the tokens'), and far less for tokens. 4 of them.
    assert bounds.typical == pytest.approx(-1.5, abs=4 * 0.4 / np.sqrt(4000))
    assert bounds.between_texts == pytest.approx(0.3, rel=4 * 2.5 / np.sqrt(8000))
    assert bounds.between_tokens == pytest.approx(2.0, rel=4 / np.sqrt(2 * 4000 * 54))


@pytest.mark.parametrize("num", [70, 400])
def test_the_bounds_accept_the_share_of_further_answers_on_average(num: int) -> None:
    shares = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        bounds = calibrate_fluency(_drawn(num, rng, (20, 90)))
        shares.append(np.mean([not failed_checks(answer, bounds) for answer in _drawn(200, rng, (20, 90))]))
    # The guarantee holds for the mean over calibrations. Its standard error is that of the 60 shares.
    assert np.mean(shares) >= 0.97 - 2 * np.std(shares) / np.sqrt(60)
    # The bounds are not empty: they reject at least the half that one check may reject, less 1 / (n + 1).
    assert np.mean(shares) <= 1 - 0.015 + 1 / num + 2 * np.std(shares) / np.sqrt(60)


def test_short_answers_are_accepted_as_often_as_long_ones() -> None:
    rng = np.random.default_rng(1)
    bounds = calibrate_fluency(_drawn(3000, rng, (60, 80)), accept=0.9)
    short = np.mean([not failed_checks(answer, bounds) for answer in _drawn(3000, rng, (6, 10))])
    # A bound that ignored the length would reject about 35% of them.
    flat = np.mean([answer.log_prob >= bounds.least_log_prob(70) for answer in _drawn(3000, rng, (6, 10))])
    assert flat < 0.8
    assert short == pytest.approx(0.95, abs=0.02)


def test_too_few_answers_and_answers_that_fixed_checks_reject() -> None:
    drawn = _drawn(100, np.random.default_rng(0), (20, 90))
    with pytest.raises(InputError, match="65 answers are too few") as caught:
        calibrate_fluency(drawn[:65])
    assert "at least 66 answers" in caught.value.mend
    calibrate_fluency(drawn[:66])
    foreign = [answer._replace(script=0.0) for answer in drawn[:3]]
    with pytest.raises(InputError, match=r"of 100 answers, the checks reject script 3"):
        calibrate_fluency([*foreign, *drawn[3:]])
    with pytest.raises(InputError, match="there are no answers"):
        calibrate_fluency([])
    with pytest.raises(ValueError, match="accept"):
        calibrate_fluency(drawn, accept=1.0)


def test_answers_that_fixed_checks_reject_leave_less_to_the_others() -> None:
    drawn = _drawn(1000, np.random.default_rng(0), (20, 90))
    bounds = calibrate_fluency([*[answer._replace(script=0.0) for answer in drawn[:20]], *drawn[20:]])
    assert bounds.about["accepted"] >= 0.97
    assert bounds.max_deviations > calibrate_fluency(drawn).max_deviations


def test_bounds_are_declared_and_read_again() -> None:
    assert load_text(dump(BOUNDS), FluencyBounds, "bounds.yaml") == BOUNDS
    with pytest.raises(DeclarationError, match="min_distinct"):
        load_text(dump(BOUNDS).replace("min_distinct: 0.8", "min_distinct: 1.8"), FluencyBounds, "bounds.yaml")


def test_bounds_of_another_base_and_missing_bounds_are_rejected(small_base: Path) -> None:
    own = BOUNDS.replaced(base=base_fingerprint(small_base))
    gate = FluencyGate.open(small_base, own, device="cpu")
    assert gate.valid(["wash"], [""]) == [False]
    with pytest.raises(IncompatibleExpertsError, match="another base"):
        FluencyGate.open(small_base, BOUNDS.replaced(base="another"), device="cpu")
    with pytest.raises(UsageError, match="no bounds"):
        FluencyGate.open(small_base, device="cpu").valid(["wash"], ["rub"])
    with pytest.raises(UsageError, match="batch_size"):
        FluencyGate.open(small_base, device="cpu", batch_size=0)
    with pytest.raises(ValueError, match="zip"):
        gate.measure(["wash"], [])


@pytest.mark.slow
def test_the_embedded_base_accepts_its_own_answers_and_rejects_broken_ones() -> None:
    generator = Generator.open(BASE_FOLDER, device="cpu")
    asked = [prompt for prompt in prompts("seen", 160, 0) for _ in range(2)]
    answers = [texts[0] for texts in generator.answers(asked, max_new_tokens=60, seed=1)]
    gate = FluencyGate(generator)
    measured = gate.measure(asked, answers)
    bounds = calibrate_fluency(measured[::2], max_new_tokens=60)
    held_out = [not failed_checks(each, bounds) for each in measured[1::2]]
    # 160 answers: the standard error of a share of .97 is .0135
    assert np.mean(held_out) >= 0.97 - 2 * 0.0135

    rng = random.Random(0)
    words = [answer.split() for answer in answers[:80]]
    broken: dict[str, list[str]] = {
        "shuffled": [" ".join(rng.sample(each, len(each))) + "." for each in words],
        "repeated": [" ".join(each[:5] * 8) + "." for each in words],
        "random": [
            str(generator.tokenizer.decode(rng.choices(range(50, len(generator.tokenizer)), k=40))) for _ in words
        ],
    }
    for kind, texts in broken.items():
        found = [not failed_checks(each, bounds) for each in gate.measure(asked[:80], texts)]
        assert np.mean(found) < 0.1, kind
    counts = num_failed(gate.measure(asked[:80], broken["repeated"]), bounds)
    assert counts["loops"] > 70
