"""Implicit rewards against transformers and PEFT, which compute one adapter and one text at a time, in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from personalized_soups import SoupModel
from personalized_soups.errors import InputError, UsageError
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.encoded_answers import EncodedAnswer
from personalized_soups.scoring.expert_digests import expert_digest
from personalized_soups.scoring.implicit_rewards import ImplicitRewards
from personalized_soups.scoring.log_probs import answer_log_probs
from tests.mixing.worlds import LOGITS, write_experts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ITEMS = [
    TextItem("How do I wash the kettle?", "Wash it with warm water and soap, then rub it dry."),
    TextItem("wash", "rub"),
    TextItem("How do I wash the old kettle so that it looks nice again?", "With a clean towel."),
    TextItem("How do I wash the kettle?", "No."),
    TextItem("wash", "Éß — 水"),
]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return write_experts(tmp_path / "experts", base="base")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request: pytest.FixtureRequest, folders: list[Path], small_base: Path) -> SoupModel:
    return SoupModel.from_pretrained(small_base, folders[0].parent, device=request.param)


def texts_as_ids(base: Path, item: TextItem) -> tuple[list[int], int]:
    """The ids of a conversation by the fixture's template, and where the answer begins, from the rendered text."""
    tokenizer = load_tokenizer(base)
    before = tokenizer(f"<|user|>{item.prompt}<|assistant|>", add_special_tokens=False)["input_ids"]
    after = tokenizer(f"{item.answer}<|eos|>", add_special_tokens=False)["input_ids"]
    return [*before, *after], len(before)


def true_log_prob(model: Any, ids: list[int], start: int) -> tuple[float, float]:
    """The log-probability of the tokens from `start` on, and the largest logit, from one unpadded float64 pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double().numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    total = sum(float(log_probs[place - 1, ids[place]]) for place in range(start, len(ids)))
    return total, float(np.abs(logits).max())


def true_rewards(base: Path, folders: Sequence[Path], items: Sequence[TextItem]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rewards with beta 1 by PEFT, [N, E], and how far float32 may be from them, [N, 1].

    Logits of float32 are within LOGITS of the largest logit. A token's log-probability has the error of its logit and
    that of the log-sum-exp, which is no larger. A reward is a difference of two sums over the answer's tokens.
    """
    base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    encoded = [texts_as_ids(base, item) for item in items]
    reference = [true_log_prob(base_model, *each) for each in encoded]
    columns, largest = [], max(logit for _, logit in reference)
    for folder in folders:
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        expert = PeftModel.from_pretrained(bare, folder, autocast_adapter_dtype=False).double().eval()
        policy = [true_log_prob(expert, *each) for each in encoded]
        largest = max(largest, *(logit for _, logit in policy))
        columns.append([own - other for (own, _), (other, _) in zip(policy, reference, strict=True)])
    tolerance = np.array([[4 * (len(ids) - start) * LOGITS * largest] for ids, start in encoded])
    return np.array(columns).T, tolerance


def test_rewards_are_the_differences_of_log_probabilities(
    model: SoupModel, folders: list[Path], small_base: Path
) -> None:
    want, tolerance = true_rewards(small_base, folders, ITEMS)
    rewards = ImplicitRewards(model)
    got = rewards.features(ITEMS)
    assert rewards.names == ("cold", "plain", "warm")
    assert got.dtype == np.float64
    assert (np.abs(got - want) <= tolerance).all()
    # the tolerance is far below the rewards and their differences between experts
    assert np.median(np.abs(want)) > 100 * np.median(tolerance)
    assert np.median(np.abs(np.diff(want, axis=1))) > 100 * np.median(tolerance)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 9])
def test_rewards_do_not_depend_on_batches(
    model: SoupModel, folders: list[Path], small_base: Path, batch_size: int
) -> None:
    want, tolerance = true_rewards(small_base, folders, ITEMS)
    got = ImplicitRewards(model, batch_size=batch_size).features(ITEMS)
    assert (np.abs(got - want) <= tolerance).all()


def test_items_keep_their_order_and_repeated_items_are_computed_once(model: SoupModel) -> None:
    rewards = ImplicitRewards(model)
    done: list[int] = []
    order = [3, 0, 3, 2, 1, 0]
    got = rewards.features([ITEMS[index] for index in order], on_done=done.append)
    once = rewards.features(ITEMS[:4])
    assert (got == once[order]).all()
    assert done == [4]
    assert rewards.features([]).shape == (0, 3)


def test_length_normalised_rewards_are_divided_by_the_number_of_answer_tokens(
    model: SoupModel, small_base: Path
) -> None:
    raw = ImplicitRewards(model).features(ITEMS)
    got = ImplicitRewards(model, length_normalized=True).features(ITEMS)
    lengths = [len(ids) - start for ids, start in (texts_as_ids(small_base, item) for item in ITEMS)]
    # the sums of both calls are the same numbers; only the division rounds
    assert got == pytest.approx(raw / np.array(lengths)[:, None], rel=1e-15)


def test_beta_comes_from_the_recipe_and_can_be_replaced(folders: list[Path], small_base: Path) -> None:
    record = {"side": "warm", "recipe": {"dpo": {"beta": 0.25}}}
    (folders[2] / "expert.json").write_text(json.dumps(record), encoding="utf-8")
    model = SoupModel.from_pretrained(small_base, folders[0].parent, device="cpu")
    rewards = ImplicitRewards(model)
    assert rewards.betas == {"cold": 1.0, "plain": 1.0, "warm": 0.25}
    plain = ImplicitRewards(model, beta=1.0).features(ITEMS)
    assert rewards.features(ITEMS) == pytest.approx(plain * [1.0, 1.0, 0.25], rel=1e-15)
    own = ImplicitRewards(model, beta={"cold": 2.0, "plain": 3.0, "warm": 5.0})
    assert own.features(ITEMS) == pytest.approx(plain * [2.0, 3.0, 5.0], rel=1e-15)


def test_some_experts_can_be_chosen(model: SoupModel) -> None:
    both = ImplicitRewards(model, experts=["warm", "cold"])
    assert both.names == ("warm", "cold")
    want = ImplicitRewards(model).features(ITEMS[:1])[:, [2, 0]]
    # the batch has other rows, so float32 matrix products may round in another order
    assert both.features(ITEMS[:1]) == pytest.approx(want, abs=1e-3)
    assert abs(want[0, 0] - want[0, 1]) > 2e-3


def test_wrong_arguments_are_rejected(model: SoupModel) -> None:
    with pytest.raises(UsageError, match="no expert is called 'colt'") as caught:
        ImplicitRewards(model, experts=["colt"])
    assert caught.value.mend == "did you mean 'cold'?"
    with pytest.raises(UsageError, match="beta of 'cold' is -1"):
        ImplicitRewards(model, beta=-1)
    with pytest.raises(UsageError, match="no beta is given for the experts plain, warm"):
        ImplicitRewards(model, beta={"cold": 1.0})
    with pytest.raises(UsageError, match="batch_size is 0"):
        ImplicitRewards(model, batch_size=0)


def test_an_answer_that_is_too_long_is_rejected(model: SoupModel) -> None:
    with pytest.raises(InputError, match="but the model takes at most 256"):
        ImplicitRewards(model).features([TextItem("wash", "rub it dry with soap " * 80)])


def test_a_replaced_expert_is_not_used_under_the_old_digest(model: SoupModel, folders: list[Path]) -> None:
    rewards = ImplicitRewards(model)
    model.experts.add(folders[0], name="warm")
    with pytest.raises(UsageError, match="replaced or removed: warm"):
        rewards.features(ITEMS)


def test_the_digest_covers_what_changes_rewards(folders: list[Path], small_base: Path, tmp_path: Path) -> None:
    model = SoupModel.from_pretrained(small_base, folders[0].parent, device="cpu")
    digest = ImplicitRewards(model).digest
    assert ImplicitRewards(model, batch_size=7).digest == digest
    changed = {ImplicitRewards(model, beta=0.5).digest, ImplicitRewards(model, length_normalized=True).digest}
    copy = tmp_path / "copies"
    shutil.copytree(folders[0].parent, copy)
    same = SoupModel.from_pretrained(small_base, copy, device="cpu")
    assert ImplicitRewards(same).digest == digest
    config = json.loads((copy / "warm" / "adapter_config.json").read_text())
    (copy / "warm" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 4}))
    changed.add(ImplicitRewards(SoupModel.from_pretrained(small_base, copy, device="cpu")).digest)
    shutil.copy(folders[0] / "adapter_model.safetensors", copy / "cold" / "adapter_model.safetensors")
    assert expert_digest(copy / "cold") == expert_digest(folders[0])
    assert expert_digest(copy / "warm") != expert_digest(folders[2])
    changed.add(ImplicitRewards(model, experts=["cold", "plain"]).digest)
    assert len(changed | {digest}) == 5


def test_logits_are_computed_for_answers_only(model: SoupModel) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = model.model.lm_head.register_forward_hook(lambda _module, inputs, _output: shapes.append(inputs[0].shape))
    item = TextItem("How do I wash the old kettle so that it looks nice again?", "No.")
    ImplicitRewards(model).features([item])
    hook.remove()
    ids, start = texts_as_ids(Path(model.model.name_or_path), item)
    # one position more than the answer has tokens: the last one predicts what follows the end token
    assert [shape[:2] for shape in shapes] == [(4, len(ids) - start + 1)]


def test_batches_are_limited_by_the_memory_of_logits(model: SoupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = model.generator.num_embeddings
    assert vocabulary is not None
    limit = 60 * vocabulary * 4
    monkeypatch.setattr("personalized_soups.scoring.implicit_rewards._LOGITS_BYTES", limit)
    sizes: list[int] = []
    hook = model.model.lm_head.register_forward_hook(lambda _module, _inputs, out: sizes.append(out.nbytes))
    want = ImplicitRewards(model, batch_size=1).features(ITEMS)
    sizes.clear()
    got = ImplicitRewards(model).features(ITEMS)
    hook.remove()
    assert max(sizes) <= limit
    assert len(sizes) < 4 * len(ITEMS)
    assert got == pytest.approx(want, abs=1e-3)


def test_models_with_learned_positions_do_not_count_the_padding() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    answers = [EncodedAnswer((3, 4, 5, 6, 7, 8, 9), 3), EncodedAnswer((1, 2, 3), 2)]
    got = answer_log_probs(model, answers, 0, repeats=2)
    model.double()
    want = [true_log_prob(model, list(answer.ids), len(answer.ids) - answer.num_answer) for answer in answers]
    for row in got.total.tolist():
        for value, (log_prob, largest) in zip(row, want, strict=True):
            assert abs(value - log_prob) <= 2 * 3 * LOGITS * max(1.0, largest)
    # the log-probability of each token is the difference of those of two beginnings of the answer
    for place, answer in enumerate(answers):
        ids, start = list(answer.ids), len(answer.ids) - answer.num_answer
        sums = [0.0, *(true_log_prob(model, ids[:end], start)[0] for end in range(start + 1, len(ids) + 1))]
        least = min(after - before for before, after in pairwise(sums))
        np.testing.assert_allclose(got.least[:, place], least, atol=1e-5)
