"""Mixed batches give the same answers as single prompts, with every option of transformers' generate."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalized_soups import Profile, SoupModel
from personalized_soups.declare.expert_weights import ProfileLike
from personalized_soups.errors import DeclarationError, RunError, UsageError
from personalized_soups.mixing.fitting import Room
from tests.mixing.worlds import LOGITS, open_model, random_ids, relative, true_logits, write_experts

PROMPTS = ["wash the kettle", "rub it dry with a clean towel so that it looks nice", "soap"]
PROFILES: list[ProfileLike] = [{"cold": 0.9, "warm": 0.8}, None, {"plain": 2.0, "warm": -1.0}]


def test_answers_in_a_mixed_batch_are_those_alone(model: SoupModel) -> None:
    together = model.generate(PROMPTS, PROFILES, max_new_tokens=12)
    alone = [model.generate(prompt, [who], max_new_tokens=12) for prompt, who in zip(PROMPTS, PROFILES, strict=True)]
    assert together == [answer for (answer,) in alone]
    assert len(set(together)) == 3
    turned = model.generate(PROMPTS[::-1], PROFILES[::-1], max_new_tokens=12, batch_size=2)
    assert turned == together[::-1]


def test_sampled_answers_do_not_depend_on_their_neighbours(model: SoupModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "seed": 5}
    together = model.generate(PROMPTS, PROFILES, **options)
    others: list[ProfileLike] = [PROFILES[0], "warm", "cold"]
    assert model.generate(PROMPTS, others, **options)[0] == together[0]
    assert model.generate(PROMPTS, PROFILES, **{**options, "seed": 6}) != together


def test_one_profile_serves_all_prompts(model: SoupModel) -> None:
    one = model.generate(PROMPTS, {"warm": 0.8}, max_new_tokens=8)
    assert one == model.generate(PROMPTS, [{"warm": 0.8}] * 3, max_new_tokens=8)
    assert one != model.generate(PROMPTS, max_new_tokens=8)


def _padded(model: SoupModel) -> tuple[Tensor, Tensor]:
    ids = random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


@pytest.mark.parametrize(
    ("options", "rows_each"),
    [
        ({"num_beams": 3}, 1),
        ({"num_beams": 3, "num_return_sequences": 2}, 2),
        ({"do_sample": True, "top_k": 1, "num_return_sequences": 3}, 3),
        ({"cache_implementation": "static"}, 1),
        ({"use_cache": False}, 1),
        ({"num_beams": 2, "do_sample": False, "length_penalty": 0.5}, 1),
        ({"prompt_lookup_num_tokens": 2}, 1),
    ],
)
def test_every_decoding_option_gives_what_it_gives_alone(
    model: SoupModel, options: dict[str, Any], rows_each: int
) -> None:
    ids, mask = _padded(model)
    profiles = PROFILES[::2]
    settings: dict[str, Any] = {"max_new_tokens": 7, "pad_token_id": 2, "eos_token_id": 1, **options}
    alone = [
        model.generate(profiles=[who], input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1], **settings)
        for row, who in enumerate(profiles)
    ]
    if "prompt_lookup_num_tokens" in options:  # transformers takes one row at a time there
        with model.mixture([profiles[0]]):
            plain = model.model.generate(input_ids=ids[:1], attention_mask=mask[:1], max_new_tokens=7, eos_token_id=1)
        assert torch.equal(alone[0], plain)
        return
    together = model.generate(profiles=profiles, input_ids=ids, attention_mask=mask, **settings)
    assert together.shape[0] == 2 * rows_each
    for row, (got, want) in enumerate(zip(together.split(rows_each), alone, strict=True)):
        width = want.shape[1]
        assert torch.equal(got[:, :width], want), row
        assert bool((got[:, width:] == 2).all())


def test_options_of_transformers_take_texts_too(model: SoupModel) -> None:
    answers = model.generate(PROMPTS, PROFILES, max_new_tokens=6, num_beams=2, num_return_sequences=2, batch_size=2)
    assert len(answers) == 6
    best = model.generate(PROMPTS[2:], PROFILES[2:], max_new_tokens=6, num_beams=2)
    assert answers[4] == best[0]
    sampled: dict[str, Any] = {"max_new_tokens": 6, "do_sample": True, "top_p": 0.9, "temperature": 1.5}
    state = torch.get_rng_state()
    drawn = [model.generate(PROMPTS, PROFILES, seed=seed, **sampled) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)
    greedy = model.generate(PROMPTS, PROFILES, max_new_tokens=6)
    assert model.generate(PROMPTS, PROFILES, max_new_tokens=6, use_cache=True) == greedy


def test_teacher_forced_logits_of_generated_rows_are_the_merged_models(tmp_path: Path, small_base: Path) -> None:
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    ids = random_ids(3, 6)
    rows: list[dict[str, float] | None] = [{"cold": 0.9}, None, {"plain": 1.0, "warm": -1.0}]
    out = model.generate(
        profiles=rows, input_ids=ids, max_new_tokens=8, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    logits = torch.stack(out.logits, dim=1)
    close = 0
    for row, weights in enumerate(rows):
        want = true_logits(small_base, folders, weights, out.sequences[row])[5:-1]
        assert relative(logits[row], want) < LOGITS
        # Two greedy tokens may differ only where the two largest logits are closer than the error that both may have.
        owed = 2 * LOGITS * float(want.norm()) / want.shape[0] ** 0.5
        top = want.topk(2, dim=-1)
        is_other = top.indices[:, 0] != out.sequences[row, 6:]
        close += int(is_other.sum())
        assert bool(((top.values[:, 0] - top.values[:, 1])[is_other] < owed).all())
    assert close == 0  # none of these 24 tokens is so close


def test_streams_give_the_same_text(model: SoupModel) -> None:
    want = model.generate(PROMPTS[:1], PROFILES[:1], max_new_tokens=10)
    pieces = list(model.stream(PROMPTS[0], PROFILES[0], max_new_tokens=10))
    assert len(pieces) > 1
    assert "".join(pieces) == want[0]


def test_a_stream_may_be_read_by_any_thread_and_left_early(model: SoupModel) -> None:
    want = model.generate(PROMPTS[:1], PROFILES[:1], max_new_tokens=10)[0]
    pieces = model.stream(PROMPTS[0], PROFILES[0], max_new_tokens=10)
    first: list[str] = []
    reader = threading.Thread(target=lambda: first.append(next(pieces)))
    reader.start()
    reader.join()
    assert first[0] + "".join(pieces) == want
    left = model.stream(PROMPTS[0], PROFILES[0], max_new_tokens=200)
    assert want.startswith(next(left))
    left.close()  # type: ignore[attr-defined]
    with ThreadPoolExecutor(1) as pool:  # the stream's mixture has ended: another thread need not wait for it
        assert pool.submit(model.generate, PROMPTS[:1], PROFILES[:1], max_new_tokens=10).result() == [want]
    with pytest.raises(UsageError, match="no profile or expert is called 'wram'"):
        next(model.stream(PROMPTS[0], "wram"))


def test_a_streamer_on_a_thread_of_its_own_sees_the_mixture(model: SoupModel) -> None:
    from transformers import TextIteratorStreamer

    ids = random_ids(1, 5)
    alone = model.generate(profiles=["warm"], input_ids=ids, max_new_tokens=6, eos_token_id=None)
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True)  # type: ignore[arg-type]
    with model.mixture(["warm"]):
        keywords = {"input_ids": ids, "max_new_tokens": 6, "eos_token_id": None, "streamer": streamer}
        thread = threading.Thread(target=model.model.generate, kwargs=keywords)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert model.tokenizer is not None
    assert text == model.tokenizer.decode(alone[0, 5:])


def test_pipelines_run_within_a_mixture(model: SoupModel) -> None:
    from transformers import pipeline

    make: Any = pipeline
    pipe = make("text-generation", model=model.model, tokenizer=model.tokenizer, device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    bare = pipe("wash the kettle", **options)[0]["generated_text"]
    with model.mixture({"warm": 2.0}):
        warm = pipe("wash the kettle", **options)[0]["generated_text"]
    assert warm != bare
    assert pipe("wash the kettle", **options)[0]["generated_text"] == bare


def test_a_schedule_moves_the_weights_from_the_next_token_on(tmp_path: Path, small_base: Path) -> None:
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    ids = random_ids(2, 6)
    steps: list[int] = []

    def falling(step: int) -> float:
        steps.append(step)
        return 1.0 - 0.25 * step

    out = model.generate(
        profiles=[{"warm": falling}, {"cold": 0.5}], input_ids=ids, max_new_tokens=4, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert sorted(set(steps)) == [0, 1, 2, 3, 4]
    # The first token's logits are those of the first weight. For the second token, the model has read the prompt with
    # the first weight and the first token with the second weight.
    assert relative(out.logits[0][0], true_logits(small_base, folders, {"warm": 1.0}, ids[0])[-1]) < LOGITS
    assert relative(out.logits[3][1], true_logits(small_base, folders, {"cold": 0.5}, out.sequences[1])[-2]) < LOGITS
    with torch.no_grad(), model.mixture([{"warm": falling}]) as mixture:
        first = model(input_ids=ids[:1], use_cache=True)
        mixture.step(1)
        second = model(input_ids=out.sequences[:1, 6:7], past_key_values=first.past_key_values)
    assert relative(second.logits[0, -1], out.logits[1][0]) < LOGITS
    for weight in (1.0, 0.75):  # neither weight all the way gives the second token's logits
        whole = true_logits(small_base, folders, {"warm": weight}, out.sequences[0, :7])[-1]
        assert relative(out.logits[1][0], whole) > 100 * LOGITS


def test_weights_may_differ_by_layer(tmp_path: Path, small_base: Path) -> None:
    write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    ids = random_ids(2, 6)
    layered: list[ProfileLike] = [{"warm": {"*.layers.0.*": 0.9, "*.mlp.*": -0.4}}, {"cold": 1.0}]
    with torch.no_grad(), model.mixture(layered):
        got = model(input_ids=ids).logits
    with torch.no_grad(), model.mixture([{"warm": {"*": 0.9}}, {"cold": {"*": 1.0}}]):
        uniform = model(input_ids=ids).logits
    with torch.no_grad(), model.mixture([{"warm": 0.9}, {"cold": 1.0}]):
        assert torch.equal(uniform, model(input_ids=ids).logits)
    assert torch.equal(got[1], uniform[1])
    assert not torch.equal(got[0], uniform[0])
    gates = model.layers.gates
    with model.mixture(layered):
        for name, layer in model.layers.by_name.items():
            expected = 0.9 if ".layers.0." in name else -0.4 if ".mlp." in name else 0.0
            place = layer.stack.experts.index("warm")
            start = sum(layer.stack.ranks[:place])
            assert gates.of(layer.slot)[0, start].item() == pytest.approx(expected * layer.stack.scalings[place])
    with pytest.raises(DeclarationError, match=r"'\*\.nowhere' matches no layer that experts adapt"):
        model.generate(PROMPTS[:1], [{"warm": {"*.nowhere": 1.0}}])


@pytest.mark.parametrize(
    ("prompts", "profiles", "problem"),
    [
        (PROMPTS, PROFILES[:2], "the number of profiles is 2, but the number of prompts is 3"),
        ([], [], "there are no prompts"),
        (PROMPTS[:1], ["wram"], "no profile or expert is called 'wram'"),
        (PROMPTS[:1], [{"wram": 1.0}], "no expert is called 'wram'"),
        (PROMPTS[:1], [{"warm": float("nan")}], "not a finite number"),
        (PROMPTS[:1], [{"warm": float("inf")}], "not a finite number"),
        (PROMPTS[:1], [{"warm": True}], "not a finite number"),
        (PROMPTS[:1], [{"warm": 1e31}], "must be between"),
        (PROMPTS[:1], [{"warm": lambda step: float("nan")}], "not a finite number"),
        (PROMPTS[:1], [3.0], "but it is of type float"),
        (PROMPTS[:1], [Profile(weights={"warm": 1.0}, rank=2)], "a mixture is exact"),
        (PROMPTS[:1], [Profile(weights={"warm": 1.0}, method="ties")], "a mixture is always linear"),
    ],
)
def test_bad_input_is_rejected(model: SoupModel, prompts: Sequence[str], profiles: Sequence[Any], problem: str) -> None:
    with pytest.raises((UsageError, DeclarationError), match=problem) as caught:
        model.generate(prompts, profiles, max_new_tokens=2)
    assert caught.value.mend
    assert not model.layers.gates.is_on


def test_a_batch_of_other_rows_is_rejected_by_the_layer(model: SoupModel) -> None:
    with (
        pytest.raises(UsageError, match=r"for 2 rows \(2 profiles, rows_each=1\), but the batch has 4 rows"),
        model.mixture(["warm"] * 2),
    ):
        model(input_ids=random_ids(4, 3))
    rows = torch.zeros(1, 4, dtype=torch.int64)
    with (
        pytest.raises(UsageError, match=r"have shape \[1, 3\], but rows has shape \[1, 4\]"),
        model.mixture(["warm"], rows=rows),
    ):
        model(input_ids=random_ids(1, 3))
    with (
        pytest.raises(UsageError, match=r"for 1 rows \(1 profiles, rows_each=1\), but the batch has 4 rows"),
        model.mixture(["warm"]),
    ):
        model(input_ids=random_ids(4, 3))
    with model.mixture("warm"), torch.no_grad():
        model(input_ids=random_ids(4, 3))
    with (
        pytest.raises(UsageError, match="range from 0 to 1, but the number of profiles is 1"),
        model.mixture(["warm"], rows=rows + torch.tensor([0, 1, 0, 1])),
    ):
        pass
    with pytest.raises(UsageError, match="there are no profiles"), model.mixture([]):
        pass


def test_opposed_sides_are_rejected(tmp_path: Path, small_base: Path) -> None:
    folders = write_experts(tmp_path / "experts")
    for folder, side in zip(folders, ("friendly", "concise", "unfriendly"), strict=True):
        (folder / "expert.json").write_text(
            f'{{"side": "{side}", "dimension": "{"style" if "f" in side else "length"}"}}'
        )
    model = open_model(small_base, tmp_path / "experts")
    with pytest.raises(DeclarationError, match="two sides of one dimension"):
        model.generate(PROMPTS[:1], [{"cold": 0.5, "warm": 0.5}])
    allowed = Profile(weights={"cold": 0.5, "warm": 0.5}, allow_opposed=True)
    assert len(model.generate(PROMPTS[:1], [allowed], max_new_tokens=2)) == 1


def test_a_batch_too_large_for_the_gpu_says_how_many_prompts_fit(
    model: SoupModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a device of 1000 bytes of which the model has 100; a row's forward takes 60 more, so 14 rows fit (0.95 * 900 / 60)
    peak = 0
    most_rows = 1

    def forget() -> None:
        nonlocal peak
        peak = 100

    monkeypatch.setattr(Room, "of", lambda _device: Room(lambda: 1000, lambda: 100, lambda: peak, forget))

    def forward(_module: Any, _arguments: Any, keywords: Any) -> None:
        nonlocal peak
        if len(keywords["input_ids"]) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        peak = 160

    handle = model.model.register_forward_pre_hook(forward, with_kwargs=True)
    for options, fix in (({}, "batch_size 14"), ({"num_beams": 3}, "batch_size 4")):
        with pytest.raises(RunError, match="no room for a batch of") as caught:
            model.generate(["soap"] * 20, ["warm"] * 20, max_new_tokens=3, **options)  # type: ignore[arg-type]
        assert caught.value.mend == f"use {fix}"
    with pytest.raises(RunError) as caught:
        model.generate(["soap"] * 5, ["warm"] * 5, max_new_tokens=3)
    assert caught.value.mend == "use batch_size 4"  # fewer than the batch that did not fit
    most_rows = 0
    with pytest.raises(RunError) as caught:
        model.generate(["soap"] * 5, ["warm"] * 5, max_new_tokens=3)
    assert "a single prompt does not fit" in caught.value.mend
    assert not model.layers.gates.is_on
    handle.remove()
