"""Multi-objective decoding: each token is that of a slow loop over separate models without a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from personalized_soups import SoupModel
from personalized_soups.errors import UsageError
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.sampling import choose_tokens, uniforms
from personalized_soups.mixing.log_prob_mixing import MixedLogProbs
from personalized_soups.mixing.personal_answers import answer
from personalized_soups.mixing.personal_model import BestOf, MixLogProbs, PersonalModel

PROMPTS = ["wash the kettle", "rub it dry with a clean towel so that it looks nice", "soap"]
PARTS: list[dict[str | None, float]] = [
    {"cold": 0.5, "warm": 0.5},
    {"plain": 1.3, None: -0.3},
    {"cold": 0.25, "warm": 0.25, "plain": 0.5},
]
NUM = 10


def slow_answer(
    model: SoupModel, prompt: str, parts: Mapping[str | None, float], *, temperature: float, seed: int, place: int
) -> str:
    """Return the answer by one forward pass for each soup and token, of one row, over all tokens so far."""
    assert model.tokenizer is not None
    generator = Generator(model.model, model.tokenizer)
    tokens, start = generator.encoded(prompt), len(generator.encoded(prompt))
    draws = torch.from_numpy(uniforms(seed, place, NUM))
    for step in range(NUM):
        mixed = torch.zeros(1)
        for profile, weight in parts.items():
            with model.mixture([profile]), torch.no_grad():
                logits = model.model(input_ids=torch.tensor([tokens])).logits[:, -1]
            mixed = mixed + weight * torch.log_softmax(logits.double(), dim=-1)
        token = int(choose_tokens(mixed.float(), draws[step : step + 1], temperature)[0])
        tokens = [*tokens, token]
        if token in generator.stop_ids:
            break
    return generator.text(tokens[start:])


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, 0), (0.8, 3)])
def test_answers_are_those_of_a_slow_loop(model: SoupModel, temperature: float, seed: int) -> None:
    users = [PersonalModel(decoder=MixLogProbs(parts)) for parts in PARTS]
    found = answer(model, PROMPTS, users, max_new_tokens=NUM, temperature=temperature, seed=seed, batch_size=4)
    expected = [
        slow_answer(model, prompt, parts, temperature=temperature, seed=seed, place=place)
        for place, (prompt, parts) in enumerate(zip(PROMPTS, PARTS, strict=True))
    ]
    assert found == expected
    assert len(set(found)) == len(found)


def test_one_part_is_its_own_soup_and_others_share_the_call(model: SoupModel) -> None:
    users = [PersonalModel(decoder=MixLogProbs({"cold": 1.0})), PersonalModel({"cold": 1.0}), PersonalModel()]
    for options in ({}, {"temperature": 0.9, "seed": 4}):
        mixed, soup, base = answer(model, [PROMPTS[0]] * 3, users, max_new_tokens=NUM, places=[7, 7, 7], **options)  # type: ignore[arg-type]
        assert mixed == soup != base


def test_batches_divide_no_group(model: SoupModel) -> None:
    users = [PersonalModel(decoder=MixLogProbs(PARTS[2]))] * 3
    whole = answer(model, PROMPTS, users, max_new_tokens=NUM)
    for batch_size in (1, 2, 4, 5):
        assert answer(model, PROMPTS, users, max_new_tokens=NUM, batch_size=batch_size) == whole


def test_a_row_without_weight_plays_no_part() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0], [float("-inf"), 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    mixed = MixedLogProbs(torch.tensor([1.0, 0.0, 0.5, 0.5]), 2)(torch.zeros(4, 1), scores)
    torch.testing.assert_close(mixed[0], torch.log_softmax(scores[0], dim=-1))
    torch.testing.assert_close(mixed[0], mixed[1])
    torch.testing.assert_close(mixed[2], torch.log_softmax(scores[2:], dim=-1).mean(dim=0))


def test_wrong_use_is_rejected(model: SoupModel) -> None:
    rows: list[tuple[Sequence[int] | None, list[float], str]] = [
        (None, [0.5, 0.5, 0.5], "places"),
        ([0, 0, 1], [0.5, 0.5, 0.5], "sizes [1, 2]"),
        ([0, 0, 0], [0.5], "log_prob_weights has 1 entries"),
    ]
    for places, weights, message in rows:
        with pytest.raises(UsageError) as caught:
            model.generate(PROMPTS, None, places=places, log_prob_weights=weights)
        assert message in f"{caught.value.what} {caught.value.where}"
    with pytest.raises(UsageError, match="cannot be combined"):
        model.generate(PROMPTS, None, log_prob_weights=[1.0] * 3, num_beams=2)
    with pytest.raises(UsageError, match="at least one"):
        MixLogProbs({})
    with pytest.raises(UsageError, match="finite"):
        MixLogProbs({"cold": float("nan")})
    with pytest.raises(UsageError, match="also a profile"):
        answer(model, PROMPTS[0], PersonalModel({"cold": 1.0}, decoder=MixLogProbs({"warm": 1.0})))
    assert BestOf(1, lambda prompt, text: 0.0).num_answers == 1
