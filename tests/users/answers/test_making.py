"""Making questions: the answers, their rewards, and the pool as a whole, with random experts of the small base."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from personalized_soups import SoupModel
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import InputError, UsageError
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.expert_digests import expert_digest
from personalized_soups.scoring.implicit_rewards import ImplicitRewards
from personalized_soups.users.answers.candidates import random_profiles, sample_candidates
from personalized_soups.users.answers.making import make_questions
from personalized_soups.users.answers.pool import QuestionPool
from tests.mixing.worlds import write_experts

PROMPTS = ["How do I wash the kettle?", "Why rub it dry?", "How?", "Which towel is clean?"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("making") / "experts"
    write_experts(folder)
    return folder


@pytest.fixture(scope="module")
def model(experts: Path, small_base: Path) -> SoupModel:
    return SoupModel.from_pretrained(small_base, experts, device="cpu")


@pytest.fixture(scope="module")
def pool(model: SoupModel) -> QuestionPool:
    # random models rarely end their answers, so only few of many short answers do
    return make_questions(model, PROMPTS, num_questions=6, answers_per_prompt=64, max_new_tokens=48, top_p=1.0, seed=1)


def test_random_profiles_have_one_side_of_a_dimension() -> None:
    rule = SideRule({"cold": "style", "warm": "style", "long": "size", "short": "size"})
    names = ["cold", "long", "short", "warm", "own"]
    profiles = random_profiles(names, rule, 400, np.random.default_rng(0))
    assert all(profile and rule.opposed(list(profile)) is None for profile in profiles)
    assert all(0.3 <= weight <= 1.0 for profile in profiles for weight in profile.values())
    # each side is in a third of the profiles, and an expert without a dimension in two thirds (4 standard deviations)
    counts = Counter(name for profile in profiles for name in profile)
    for name, share in {"cold": 1 / 3, "warm": 1 / 3, "long": 1 / 3, "short": 1 / 3, "own": 2 / 3}.items():
        assert abs(counts[name] / 400 - share) < 4 * np.sqrt(share * (1 - share) / 400)


def test_candidates_are_different_whole_answers(model: SoupModel) -> None:
    done: list[int] = []
    items = sample_candidates(
        model, PROMPTS, answers_per_prompt=32, max_new_tokens=40, top_p=1.0, batch_size=48, seed=3, on_done=done.append
    )
    assert done == [48, 96, 128]
    assert 8 < len(items) < 128
    assert len(set(items)) == len(items)
    assert all(item.answer.strip() for item in items)
    tokenizer = model.generator.tokenizer
    # an answer of 40 tokens or more had no room for its end
    assert all(len(tokenizer(item.answer, add_special_tokens=False)["input_ids"]) < 40 for item in items)
    assert [prompt for prompt in PROMPTS for item in items if item.prompt == prompt] == [item.prompt for item in items]
    again = sample_candidates(
        model, PROMPTS, answers_per_prompt=32, max_new_tokens=40, top_p=1.0, batch_size=48, seed=3
    )
    assert again == items
    other = sample_candidates(
        model, PROMPTS, answers_per_prompt=32, max_new_tokens=40, top_p=1.0, batch_size=48, seed=4
    )
    assert other != items


def test_answers_that_are_cut_off_are_kept_up_to_their_last_whole_sentence(
    model: SoupModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = "Dust the lamp. Then wipe it, and after that you"
    answers = {
        PROMPTS[0]: [cut, "Dust it."],
        PROMPTS[1]: ["Then you could also wipe the whole lamp with a", "Wipe it."],
    }
    given = {prompt: iter(texts) for prompt, texts in answers.items()}
    monkeypatch.setattr(SoupModel, "generate", lambda self, prompts, *_, **__: [next(given[each]) for each in prompts])
    tokenizer = model.generator.tokenizer
    limit = len(tokenizer("Dust it.", add_special_tokens=False)["input_ids"]) + 1
    assert len(tokenizer(cut, add_special_tokens=False)["input_ids"]) >= limit
    items = sample_candidates(model, PROMPTS[:2], answers_per_prompt=2, max_new_tokens=limit, whole_sentences=True)
    assert items == [
        TextItem(PROMPTS[0], "Dust the lamp."),
        TextItem(PROMPTS[0], "Dust it."),
        TextItem(PROMPTS[1], "Wipe it."),
    ]


def test_a_pool_holds_the_rewards_of_its_answers(pool: QuestionPool, model: SoupModel, experts: Path) -> None:
    assert len(pool) == 6
    assert [question.id for question in pool.questions] == [f"q{number}" for number in range(1, 7)]
    rewards = pool.rewards(ImplicitRewards(model))
    assert pool.names == rewards.names
    assert pool.record.digest == rewards.digest != ImplicitRewards(model).digest
    for features, side in ((pool.a, "a"), (pool.b, "b")):
        items = [TextItem(question.prompt, getattr(question, side)) for question in pool.questions]
        # other batches round the unbounded rewards differently; divided by scales of about 0.1, that is about 1e-3
        assert rewards.features(items) == pytest.approx(features, abs=1e-3)
        assert np.abs(features).mean() > 1e-2
    digests = {name: expert_digest(experts / name) for name in pool.names}
    pool.check_experts(digests)
    with pytest.raises(UsageError, match="plain changed"):
        pool.check_experts({**digests, "plain": digests["warm"]})


def test_the_prior_of_a_pool_fits_the_scale_of_its_rewards(pool: QuestionPool) -> None:
    squares = np.einsum("qd,de,qe->q", pool.differences, pool.prior.covariance, pool.differences)
    assert np.sqrt(squares.mean()) == pytest.approx(4.0, rel=1e-6)  # the features are rounded to float32
    assert pool.record.prior["penalty"] == pytest.approx(float((pool.differences**2).sum(axis=1).mean()) / 16, rel=1e-6)


def test_equal_seeds_give_equal_pools(pool: QuestionPool, model: SoupModel) -> None:
    again = make_questions(
        model, PROMPTS * 2, num_questions=6, answers_per_prompt=64, max_new_tokens=48, top_p=1.0, seed=1
    )
    assert again.questions == pool.questions
    assert (again.a == pool.a).all()
    assert again.record == pool.record


def test_too_few_answers_give_fewer_questions_or_an_error(model: SoupModel) -> None:
    pool = make_questions(model, PROMPTS[:1], num_questions=10**6, answers_per_prompt=64, max_new_tokens=48, top_p=1.0)
    assert 0 < len(pool) < 64 * 63 / 2
    with pytest.raises(InputError, match="give no pair with different rewards"):
        make_questions(model, PROMPTS, answers_per_prompt=2, max_new_tokens=1)


def test_answers_with_the_least_likely_tokens_are_left_out(model: SoupModel) -> None:
    options = {"answers_per_prompt": 64, "max_new_tokens": 48, "top_p": 1.0, "num_questions": 10**6, "seed": 3}
    everything = answers_of(make_questions(model, PROMPTS[:1], broken_share=0, **options))  # type: ignore[arg-type]
    kept = answers_of(make_questions(model, PROMPTS[:1], broken_share=0.4, **options))  # type: ignore[arg-type]
    least = dict(zip(everything, ImplicitRewards(model).measured(list(everything)).least_log_probs, strict=True))
    num_broken = int(0.4 * len(everything))
    assert num_broken >= 1
    assert kept == set(sorted(everything, key=least.__getitem__)[num_broken:])


def answers_of(pool: QuestionPool) -> set[TextItem]:
    return {TextItem(question.prompt, text) for question in pool.questions for text in (question.a, question.b)}


def test_wrong_numbers_are_rejected(model: SoupModel) -> None:
    for name, value in {"num_questions": 0, "answers_per_prompt": 1, "batch_size": 0}.items():
        with pytest.raises(UsageError, match=f"{name} is {value}, but must be at least") as caught:
            make_questions(model, PROMPTS, **{name: value})  # type: ignore[arg-type]
        assert caught.value.where == name
    with pytest.raises(UsageError, match="temperature is 0"):
        make_questions(model, PROMPTS, temperature=0)
    with pytest.raises(UsageError, match="broken_share is 1, but"):
        make_questions(model, PROMPTS, broken_share=1)
    with pytest.raises(UsageError, match=r"top_p is 1\.5"):
        make_questions(model, PROMPTS, top_p=1.5)
