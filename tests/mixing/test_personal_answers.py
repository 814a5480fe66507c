"""Personal models in one batch: the answers of each row alone, and the logits of a float64 model without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalized_soups import SoupModel
from personalized_soups.errors import InputError, SoupError, UsageError
from personalized_soups.generation.generator import Within
from personalized_soups.mixing.personal_answers import answer
from personalized_soups.mixing.personal_model import BestOf, PersonalModel
from tests.conftest import CHAT_TEMPLATE
from tests.experts import write_expert
from tests.mixing.worlds import LOGITS, float64_model, relative

PROMPTS = ["wash the kettle", "rub it dry with a clean towel so that it looks nice", "soap", "warm water", "old soap"]
WEIGHTS: list[dict[str, float] | None] = [{"cold": 0.9, "warm": 0.8}, None, None, {"plain": 1.5}, None]
WITH_BOS = "{{ bos_token }}" + CHAT_TEMPLATE


def soft(count: int, seed: int, width: int = 64) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) / 20


# rows with a soup, with soft tokens, with both, and with neither
SOFT = [None, soft(3, 0), None, soft(5, 1), soft(1, 2)]


def users() -> list[PersonalModel]:
    return [PersonalModel(profile=weights, soft_tokens=own) for weights, own in zip(WEIGHTS, SOFT, strict=True)]


@pytest.fixture(params=[CHAT_TEMPLATE, WITH_BOS], ids=["no-bos", "bos"])
def either(model: SoupModel, request: pytest.FixtureRequest) -> SoupModel:
    assert model.tokenizer is not None
    model.tokenizer.chat_template = request.param
    return model


def test_rows_in_a_mixed_batch_are_those_alone(either: SoupModel) -> None:
    settings: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 4}]
    for options in settings:
        together = answer(either, PROMPTS, users(), max_new_tokens=12, **options)
        alone = [
            answer(either, [prompt], who, max_new_tokens=12, places=[place], **options)
            for place, (prompt, who) in enumerate(zip(PROMPTS, users(), strict=True))
        ]
        assert together == [text for (text,) in alone]
        assert len(set(together)) == len(PROMPTS)
        # the soft tokens change the answers, and rows without them are those of SoupModel.generate
        plain = either.generate(PROMPTS, WEIGHTS, max_new_tokens=12, **options)
        changed = [own is not None for own in SOFT]
        assert [got != want for got, want in zip(together, plain, strict=True)] == changed


@contextmanager
def _captured(model: SoupModel, seen: list[Tensor], tokens: list[Tensor]) -> Iterator[Any]:
    def capture(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        tokens.append(input_ids.clone())
        return scores

    def around(indices: Sequence[int]) -> Any:
        @contextmanager
        def entered() -> Iterator[Within]:
            with model.mixture([WEIGHTS[index] for index in indices]):
                yield Within([capture], soft_tokens=[SOFT[index] for index in indices])

        return entered()

    yield around


def test_logits_are_those_of_a_float64_model_without_cache(
    either: SoupModel, small_base: Path, folders: list[Path]
) -> None:
    seen: list[Tensor] = []
    tokens: list[Tensor] = []
    with _captured(either, seen, tokens) as around:
        either.generator.answers(PROMPTS, greedy=True, max_new_tokens=6, around=around, in_order=True)
    num_steps = len(seen)
    assert num_steps == 6
    answers = tokens[-1][:, -(num_steps - 1) :]
    assert either.tokenizer is not None
    for row, prompt in enumerate(PROMPTS):
        own = WEIGHTS[row] or {}
        names = [folder for folder in folders if folder.name in own]
        oracle = float64_model(small_base, names, [own[folder.name] for folder in names])
        ids = either.generator.encoded(prompt)
        cut = 1 if ids[0] == either.tokenizer.bos_token_id else 0
        assert cut == (either.tokenizer.chat_template == WITH_BOS)
        embed = oracle.get_input_embeddings()
        parts = [embed(torch.tensor(ids[:cut], dtype=torch.int64))]
        parts += [] if SOFT[row] is None else [SOFT[row].double()]  # type: ignore[union-attr]
        parts += [embed(torch.tensor(ids[cut:])), embed(answers[row])]
        with torch.no_grad():
            want = oracle(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0, -num_steps:]
        got = torch.stack([scores[row] for scores in seen])
        # after an end token, transformers pads the row with tokens that the oracle would read
        length = int((answers[row] == either.tokenizer.eos_token_id).cumsum(0).eq(0).sum()) + 1
        assert length > 1
        assert relative(got[:length], want[:length]) < LOGITS, row


def test_a_batch_without_soft_tokens_is_that_of_generate_bit_for_bit(model: SoupModel) -> None:
    seen: list[list[Tensor]] = [[], []]
    for captured, rows in zip(seen, ([None] * 5, ()), strict=True):

        def capture(_: Tensor, scores: Tensor, captured: list[Tensor] = captured) -> Tensor:
            captured.append(scores.clone())
            return scores

        @contextmanager
        def around(_: Sequence[int], rows: Any = rows, capture: Any = capture) -> Iterator[Within]:
            with model.mixture(WEIGHTS):
                yield Within([capture], soft_tokens=rows)

        model.generator.answers(PROMPTS, greedy=True, max_new_tokens=4, around=around, in_order=True)
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))
    assert len(seen[0]) == 4


def test_private_adapters_share_a_batch_and_leave_the_model_as_it_was(model: SoupModel, tmp_path: Path) -> None:
    one, two = (write_expert(tmp_path / f"own-{seed}", seed=seed) for seed in (11, 12))
    rows = [
        PersonalModel(adapter=str(one)),
        PersonalModel(profile={"warm": 0.5}, adapter=two, soft_tokens=soft(2, 3)),
        PersonalModel(adapter=one, text="with warm water"),
        PersonalModel(profile="cold"),
        PersonalModel(),
    ]
    before = dict(model.experts)
    together = answer(model, PROMPTS, rows, max_new_tokens=10)
    assert dict(model.experts) == before
    assert answer(model, PROMPTS, rows, max_new_tokens=10, max_adapters=1) == together  # in two groups
    # the oracle: the adapters as experts that the model holds
    model.experts.add(one, "one")
    model.experts.add(two, "two")
    texts = [*PROMPTS[:2], f"with warm water\n\n{PROMPTS[2]}", *PROMPTS[3:]]
    weights: list[Any] = [{"one": 1.0}, {"warm": 0.5, "two": 1.0}, {"one": 1.0}, "cold", None]
    want = model.generate(texts, weights, max_new_tokens=10, soft_tokens=[None, rows[1].soft_tokens, None, None, None])
    assert together == want
    assert len(set(want)) == 5
    assert answer(model, PROMPTS, rows, max_new_tokens=10) == want  # now with the held experts


def test_best_of_n_returns_the_best_of_n_plain_samples(model: SoupModel) -> None:
    asked: list[tuple[str, str]] = []

    def longest(prompt: str, text: str) -> float:
        asked.append((prompt, text))
        return float(len(text))

    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 7}
    rows = [PersonalModel(profile="warm", text="soap", decoder=BestOf(4, longest)), PersonalModel()]
    best, plain = answer(model, PROMPTS[:2], rows, **options)
    samples = [text for _, text in asked]
    assert [prompt for prompt, _ in asked] == [PROMPTS[0]] * 4  # the reward reads the user's prompt
    assert len(set(samples)) == 4
    assert best == max(samples, key=len)
    # one of one is the plain answer, and neighbours do not change a row
    single = [PersonalModel(profile="warm", text="soap", decoder=BestOf(1, longest)), PersonalModel()]
    assert answer(model, PROMPTS[:2], single, **options) == [samples[0], plain]
    worst = [PersonalModel(profile="warm", text="soap", decoder=BestOf(4, lambda _, text: -len(text))), rows[1]]
    assert answer(model, PROMPTS[:2], worst, **options)[0] == min(samples, key=len)


def test_text_comes_before_the_first_message_of_the_user(model: SoupModel) -> None:
    chat = [
        {"role": "system", "content": "soap"},
        {"role": "user", "content": "wash"},
        {"role": "assistant", "content": "rub"},
        {"role": "user", "content": "dry"},
    ]
    got = answer(model, [chat], PersonalModel(text="old"), max_new_tokens=8)
    told = [chat[0], {"role": "user", "content": "old\n\nwash"}, *chat[2:]]
    assert got == model.generate([told], None, max_new_tokens=8)
    assert got != model.generate([chat], None, max_new_tokens=8)
    assert chat[1]["content"] == "wash"


@pytest.mark.parametrize(
    ("rows", "options", "what"),
    [
        ([PersonalModel()] * 2, {}, "personal_models has 2 entries, but the number of prompts is 1"),
        (PersonalModel(), {"places": [1, 2]}, "places has 2 entries"),
        (PersonalModel(soft_tokens=soft(2, 0, width=32)), {}, "width 32, but the base's embeddings have the width 64"),
        (PersonalModel(soft_tokens=soft(2, 0)[0]), {}, r"has shape \[64\]"),
        (PersonalModel(soft_tokens=soft(2, 0) * torch.inf), {}, "NaN or infinite"),
        (PersonalModel(soft_tokens=soft(300, 0)), {}, "300 soft tokens before them, but the model takes at most 255"),
        (PersonalModel(decoder=BestOf(2, lambda _, text: 0.0)), {}, "the temperature is 0"),
        (PersonalModel(profile={"wram": 1.0}), {}, "no expert is called 'wram'"),
        (PersonalModel(adapter=Path("nowhere")), {}, "nowhere|adapter_config.json"),
    ],
)
def test_bad_personal_models_are_refused(model: SoupModel, rows: Any, options: dict[str, Any], what: str) -> None:
    before = dict(model.experts)
    with pytest.raises((UsageError, InputError), match=what) as caught:
        answer(model, ["soap"], rows, max_new_tokens=2, **options)
    assert isinstance(caught.value, SoupError)
    assert dict(model.experts) == before
    assert model.generate(["soap"], None, max_new_tokens=2)


def test_an_adapter_that_the_profile_names_too_is_refused(model: SoupModel, folders: list[Path]) -> None:
    cold = next(folder for folder in folders if folder.name == "cold")
    with pytest.raises(UsageError, match="which is the private adapter too"):
        answer(model, ["soap"], PersonalModel(profile={"cold": 0.5}, adapter=cold), max_new_tokens=2)
    assert answer(model, ["soap"], PersonalModel(adapter=cold), max_new_tokens=4) == model.generate(
        ["soap"], "cold", max_new_tokens=4
    )


def test_a_decoder_of_no_answers_is_refused() -> None:
    with pytest.raises(UsageError, match="num_answers is 0"):
        BestOf(0, lambda _, text: 0.0)


def test_soft_tokens_go_with_our_own_sampling_only(model: SoupModel) -> None:
    with pytest.raises(UsageError, match="cannot be combined with options of transformers' generate"):
        model.generate(["soap"], None, soft_tokens=[soft(1, 0)], num_beams=2)
    with pytest.raises(UsageError, match="soft_tokens has 2 entries"):
        model.generate(["soap"], None, soft_tokens=[None, None])
