"""Regressions: each test is for a fault that a reader of the code, or a user, has found."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalized_soups import Profile, SoupModel
from personalized_soups.errors import DeclarationError, UnsupportedAdapterError, UsageError
from personalized_soups.mixing.peft_view import PeftView
from personalized_soups.mixing.prefixes import PrefixCache
from tests.experts import write_expert
from tests.mixing.worlds import LOGITS, open_model, random_ids, relative, true_logits, write_shared

PROMPT = "wash the kettle"


def _logits(model: SoupModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=ids).logits
    return result


def test_generate_without_profiles_answers_by_what_is_set_or_served(model: SoupModel) -> None:
    ids = random_ids(1, 5)
    options: dict[str, Any] = {"max_new_tokens": 6}
    want, base = (model.generate(PROMPT, [who], **options)[0] for who in ({"warm": 3.0}, None))
    assert want != base
    with model.mixture([{"warm": 3.0}]):
        assert model.generate(PROMPT, **options) == [want]
        assert model.generate(PROMPT, num_beams=1, **options) == [want]
        assert "".join(model.stream(PROMPT, **options)) == want
        tokens = model.generate(input_ids=ids, **options)
        assert torch.equal(tokens, model.model.generate(input_ids=ids, **options))
        assert model.generate(PROMPT, [None], **options) == [base]
    model.served.set_adapters("warm", 3.0)
    assert model.generate(PROMPT, **options) == [want]
    assert "".join(model.stream(PROMPT, **options, prefixes=PrefixCache())) == want
    assert torch.equal(model.generate(input_ids=ids, **options), tokens)
    assert model.generate(PROMPT, [None], **options) == [base]
    assert model.generate(PROMPT, **options) == [want]


def test_options_reach_transformers_from_token_ids_too(model: SoupModel) -> None:
    ids = random_ids(2, 5)
    options: dict[str, Any] = {
        "profiles": ["warm", "cold"],
        "input_ids": ids,
        "max_new_tokens": 12,
        "eos_token_id": None,
    }
    greedy = model.generate(**options)
    cold = model.generate(**options, do_sample=True, temperature=1e-6)
    assert torch.equal(cold, greedy)
    hot = [model.generate(**options, temperature=2.0, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(hot[0], hot[1])
    assert not torch.equal(hot[0], hot[2])
    with pytest.raises(UsageError, match="are both given"):
        model.generate(PROMPT, **options)


def test_answering_texts_leaves_the_models_own_generation_config(model: SoupModel) -> None:
    before = model.model.generation_config.to_dict()
    assert before["eos_token_id"] is not None
    model.generate(PROMPT, ["warm"], max_new_tokens=2)
    model.generate(PROMPT, ["warm"], max_new_tokens=2, num_beams=2)
    list(model.stream(PROMPT, "warm", max_new_tokens=2))
    assert model.model.generation_config.to_dict() == before


def test_a_generation_config_of_ones_own_keeps_the_length_that_is_asked_for(model: SoupModel) -> None:
    from transformers import GenerationConfig

    config = GenerationConfig(num_beams=2, max_new_tokens=3)
    beams = model.generate(PROMPT, ["warm"], max_new_tokens=9, num_beams=2)
    assert model.generate(PROMPT, ["warm"], max_new_tokens=9, generation_config=config) == beams
    assert model.generate(PROMPT, ["warm"], generation_config=config) != beams
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        model.generate(PROMPT, ["warm"], max_new_tokens=0)


def test_cache_keys_of_other_orders_models_and_dtypes_differ(
    model: SoupModel, folders: list[Path], small_base: Path
) -> None:
    patterns = {"*.layers.0.*": 0.9, "*.mlp.*": -0.4}
    turned = dict(reversed(patterns.items()))
    assert model.cache_key({"warm": patterns}) != model.cache_key({"warm": turned})
    other = open_model(small_base, folders[0].parent)
    for who in (None, "warm"):
        assert model.cache_key(who) != other.cache_key(who)
    before = model.cache_key("warm")
    model.double()
    assert model.cache_key("warm") != before


def test_mixtures_that_end_out_of_order_and_tasks_of_one_thread(
    model: SoupModel, folders: list[Path], small_base: Path
) -> None:
    ids = random_ids(1, 5)
    first, second = model.mixture({"warm": 1.0}), model.mixture({"cold": 1.0})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert relative(_logits(model, ids)[0], true_logits(small_base, folders, {"cold": 1.0}, ids[0])) < LOGITS
    second.__exit__(None, None, None)
    assert not model.layers.gates.is_on

    async def answer(who: str, wait: asyncio.Event, done: asyncio.Event) -> Tensor:
        with model.mixture(who):
            done.set()
            await wait.wait()
            return _logits(model, ids)

    async def both() -> list[Any]:
        first, second = asyncio.Event(), asyncio.Event()
        waiting = asyncio.create_task(answer("warm", second, first))
        await first.wait()
        refused = await asyncio.gather(answer("cold", first, second), return_exceptions=True)
        second.set()
        return [await waiting, *refused]

    got, refused = asyncio.run(both())
    assert relative(got[0], true_logits(small_base, folders, {"warm": 1.0}, ids[0])) < LOGITS
    assert isinstance(refused, UsageError)
    assert "another asyncio task" in refused.what


def test_schedules_are_refused_where_nothing_counts_tokens(model: SoupModel) -> None:
    falling = {"warm": lambda step: 1.0 - 0.1 * step}
    with pytest.raises(UsageError, match="nothing counts"):
        model.served.set(falling)
    with pytest.raises(UsageError, match="several tokens are decoded at once") as caught:
        model.generate(profiles=[falling], input_ids=random_ids(1, 5), max_new_tokens=4, prompt_lookup_num_tokens=2)
    assert caught.value.where == "prompt_lookup_num_tokens"


def test_a_schedule_may_end_with_the_answer(model: SoupModel) -> None:
    table = [1.0, 0.5, 0.2]
    options: dict[str, Any] = {"input_ids": random_ids(1, 5), "eos_token_id": None}
    assert model.generate(profiles=[{"warm": table.__getitem__}], max_new_tokens=3, **options).shape == (1, 8)
    with pytest.raises(IndexError):
        model.generate(profiles=[{"warm": table.__getitem__}], max_new_tokens=4, **options)
    assert not model.layers.gates.is_on


def test_an_expert_behind_a_router_is_refused(tmp_path: Path, small_base: Path) -> None:
    shapes = {"model.layers.0.mlp.experts.3.up_proj": (96, 64)}
    write_expert(tmp_path / "routed" / "moe", shapes=shapes)
    with pytest.raises(UnsupportedAdapterError, match="that a router sends to it"):
        open_model(small_base, tmp_path / "routed")


def test_what_is_saved_is_the_base(model: SoupModel, small_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32)
    assert model.state_dict().keys() == bare.state_dict().keys()
    with model.mixture("warm"):
        model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name, tensor in bare.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    changed = {name: tensor + 1 for name, tensor in bare.state_dict().items()}
    assert model.load_state_dict(changed).missing_keys == []
    assert all(torch.equal(tensor, changed[name]) for name, tensor in model.state_dict().items())


def test_rows_of_tokens_have_the_batchs_shape(model: SoupModel) -> None:
    rows = torch.zeros(3, 2, dtype=torch.int64)
    with (
        pytest.raises(UsageError, match=r"\[2, 3\], but rows has shape \[3, 2\]"),
        model.mixture(["warm"], rows=rows),
    ):
        model(input_ids=random_ids(2, 3))


def test_what_cannot_be_served_changes_nothing(model: SoupModel, tmp_path: Path) -> None:
    ids = random_ids(1, 5)
    model.served.set_adapters("cold")
    before = _logits(model, ids)
    for wrong in ({"*.nowhere": 1.0}, float("nan"), 1e31):
        with pytest.raises(DeclarationError):
            model.served.set_adapters("warm", wrong)
        assert torch.equal(_logits(model, ids), before)
    gate = write_expert(tmp_path / "more" / "gate", seed=9, shapes={"model.layers.1.mlp.gate_proj": (96, 64)})
    model.experts.add(gate)
    model.served.set_adapters("warm", {"*.gate_proj": 0.5, "*": 1.0})
    model.experts.remove("gate")  # no layer matches the first pattern any more
    assert model.served.experts == ["warm"]
    served = _logits(model, ids)
    model.served.set_adapters("warm")
    assert torch.equal(_logits(model, ids), served)


def test_modes_of_autograd_may_change_between_batches(tmp_path: Path, small_base: Path) -> None:
    write_shared(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    ids = random_ids(2, 5)
    with torch.inference_mode(), model.mixture(["warm", "cold"]):
        first = model(input_ids=ids).logits.clone()
    with torch.no_grad(), model.mixture(["cold", None]):
        model(input_ids=ids)
    with model.mixture(["warm", "cold"]):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        warm = model(inputs_embeds=embedded).logits
    with model.mixture(["cold", "warm"]):
        cold = model(inputs_embeds=embedded).logits
    assert relative(warm.detach(), first) < LOGITS
    (warm.square().sum() + cold.square().sum()).backward()
    assert embedded.grad is not None
    with torch.inference_mode():
        model.half()
    model.float()
    with torch.no_grad(), model.mixture(["warm", "cold"]):
        model(input_ids=ids)


def test_a_model_may_be_cast_while_something_is_served_or_set(
    model: SoupModel, folders: list[Path], small_base: Path
) -> None:
    ids = random_ids(1, 5)
    want = true_logits(small_base, folders, {"warm": 1.0}, ids[0])
    model.served.set_adapters("warm")
    assert model.double() is model
    assert relative(_logits(model, ids)[0], want) < 1e-6
    with model.mixture(["warm"]):
        model.float()
        assert relative(_logits(model, ids)[0], want) < LOGITS
    assert model.eval() is model
    last = list(model.layers.by_name.values())[-1]
    last.double()  # one layer alone
    with model.mixture(["warm"]), pytest.raises(RuntimeError):  # as the base itself does
        _logits(model, ids)
    last.float()
    assert relative(_logits(model, ids)[0], want) < LOGITS


def test_a_stream_of_its_own_within_a_mixture_is_refused_at_once(model: SoupModel) -> None:
    with model.mixture("cold"), pytest.raises(UsageError, match="would wait forever"):
        model.stream(PROMPT, "warm")


def test_windows_of_attention_are_not_kept_as_prefixes(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=16, pad_token_id=2, eos_token_id=1,
    )  # fmt: skip
    shapes = {f"model.layers.{layer}.mlp.up_proj": (48, 32) for layer in (0, 1)}
    write_expert(tmp_path / "experts" / "warm", seed=2, shapes=shapes)
    base: Any = MistralForCausalLM(config).eval()
    from tests.conftest import _small_tokenizer

    model = SoupModel(base, tmp_path / "experts", tokenizer=_small_tokenizer())
    prefixes = PrefixCache()
    long = "rub it dry with a clean towel so that it looks nice again and again"
    for prompt in (long, "soap", long):
        want = model.generate(prompt, ["warm"], max_new_tokens=20)[0]
        assert "".join(model.stream(prompt, "warm", max_new_tokens=20, prefixes=prefixes)) == want
    assert prefixes.num_bytes == 0


def test_a_kept_prefix_holds_no_more_than_it_counts(model: SoupModel) -> None:
    prefixes = PrefixCache()
    "".join(model.stream(PROMPT, "warm", max_new_tokens=60, prefixes=prefixes))
    (past, _), *_ = prefixes._entries.values()
    held = {tensor.untyped_storage() for layer in past.layers for tensor in (layer.keys, layer.values)}
    assert sum(storage.nbytes() for storage in held) == prefixes.num_bytes


@pytest.mark.slow
def test_an_opt_is_compiled(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=320, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    shapes = {"model.decoder.layers.0.fc1": (48, 32)}
    write_expert(tmp_path / "experts" / "warm", seed=2, shapes=shapes)
    model = SoupModel(OPTForCausalLM(config).eval(), tmp_path / "experts")
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.model, backend="eager", dynamic=False)
    for tokens in (6, 4):
        ids = random_ids(2, tokens)
        with torch.no_grad(), model.mixture([{"warm": 1.0}, None]):
            assert relative(compiled(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits) < LOGITS


def test_gates_and_spans_do_not_grow_without_bound(model: SoupModel) -> None:
    for rows in range(1, 65):
        with model.mixture(["warm"] * rows):
            pass
    gates = model.layers.gates
    assert sum(len(buffer) for buffer in gates._buffers.values()) <= 2 * 64
    layer = next(iter(model.layers.by_name.values()))
    for number in range(200):
        layer._used(frozenset({f"x{number}"}))
    assert len(layer._spans) <= 32


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda model: model.generate(random_ids(1, 4)), "must be a text or a list, but it is of type Tensor"),
        (lambda model: model.generate([{"role": "user", "content": "soap"}]), "one chat is"),
        (lambda model: model.generate([3]), "must be a text or a chat, but it is of type int"),
        (lambda model: model.generate(["  "]), "the prompt is empty"),
        (lambda model: model.profiles.add(Profile(user="warm", weights={"cold": 1.0})), "an expert is called 'warm'"),
    ],
)
def test_calls_that_mean_nothing_are_rejected(model: SoupModel, call: Callable[[SoupModel], Any], problem: str) -> None:
    with pytest.raises((UsageError, Exception), match=problem) as caught:
        call(model)
    assert getattr(caught.value, "mend", "")


def test_weights_that_no_gate_can_hold_are_rejected(folders: list[Path], small_base: Path) -> None:
    half = open_model(small_base, folders[0].parent, dtype="float16")
    with pytest.raises(
        UsageError, match=r"the weight of 'warm' times the expert's scaling is .*, but float16 holds at most 65504"
    ):
        half.generate(PROMPT, [{"warm": 1e5}])
    model = open_model(small_base, folders[0].parent)
    model.experts.set_scale("warm", 1e30)
    with pytest.raises(UsageError, match="but float32 holds at most"), model.mixture([{"warm": 1e30}]):
        pass
    assert not model.layers.gates.is_on


def test_numpys_numbers_are_numbers(model: SoupModel) -> None:
    import numpy as np

    assert model.cache_key({"warm": np.float32(0.5)}) == model.cache_key({"warm": 0.5})  # type: ignore[dict-item]
    assert model.cache_key({"warm": np.int64(1)}) == model.cache_key("warm")  # type: ignore[dict-item]


def test_an_expert_cannot_take_a_profiles_name(model: SoupModel, folders: list[Path]) -> None:
    model.profiles.add(Profile(user="u1", weights={"cold": 1.0}))
    with pytest.raises(UsageError, match="a profile is called 'u1'"):
        model.experts.add(folders[0], "u1")


def test_deleting_several_adapters_is_all_or_nothing(model: SoupModel) -> None:
    with pytest.raises(UsageError, match="'nope'"):
        model.experts.change([], ["warm", "nope"])
    assert "warm" in model.experts
    model.experts.change([], ["warm", "cold"])
    assert list(model.experts) == ["plain"]


def test_a_model_is_wrapped_once_and_left_as_it_was(model: SoupModel, folders: list[Path]) -> None:
    with pytest.raises(Exception, match="wrapped by another SoupModel"):
        SoupModel(model.model, folders[0].parent)
    inner = model.unload()
    assert not inner._forward_pre_hooks
    again = SoupModel(inner, folders[0].parent)
    assert list(again.experts) == ["cold", "plain", "warm"]


def test_a_view_for_peft_sees_what_the_model_serves(model: SoupModel) -> None:
    view: Any = PeftView(model)
    assert view.active_adapters == []
    model.served.set_adapters(["warm", "cold"])
    assert view.active_adapters == ["warm", "cold"]
    model.experts.remove("warm")
    assert view.active_adapters == ["cold"]


def test_what_is_served_is_not_disturbed_by_another_threads_mixture(model: SoupModel) -> None:
    options: dict[str, Any] = {"input_ids": random_ids(2, 6), "max_new_tokens": 24, "eos_token_id": None}
    model.served.set_adapters("cold")
    want = model.generate(**options)
    begun = threading.Event()
    handle = model.model.register_forward_pre_hook(lambda *_: begun.set())

    def disturb() -> None:
        begun.wait()
        with model.mixture(["warm", {"warm": -2.0}]):
            pass

    thread = threading.Thread(target=disturb)
    thread.start()
    got = model.generate(**options)
    thread.join()
    handle.remove()
    assert torch.equal(got, want)


def test_prompts_of_any_length_keep_the_rows_that_are_set(model: SoupModel) -> None:
    prompts = ["rub it dry with a clean towel so that it looks nice", "soap", "wash the kettle"]
    rows: list[Any] = [{"warm": 3.0}, {"cold": 3.0}, None]
    want = model.generate(prompts, rows, max_new_tokens=6)
    with model.mixture(rows):
        assert model.generate(prompts, max_new_tokens=6) == want
        with pytest.raises(UsageError, match=r"for 3 rows \(3 profiles"):
            model.generate(prompts, max_new_tokens=6, batch_size=2)


def test_every_answer_starts_its_schedule(model: SoupModel) -> None:
    falling = {"warm": lambda step: 3.0 - step}
    want = model.generate(PROMPT, [falling], max_new_tokens=6)
    prefixes = PrefixCache()
    with model.mixture(falling):
        for _ in range(2):
            assert model.generate(PROMPT, max_new_tokens=6) == want
        assert model.generate([PROMPT] * 2, max_new_tokens=6, batch_size=1) == want * 2
        assert "".join(model.stream(PROMPT, max_new_tokens=6, prefixes=prefixes)) == want[0]
        assert "".join(model.stream(PROMPT, max_new_tokens=6, prefixes=prefixes)) == want[0]
    assert "".join(model.stream(PROMPT, falling, max_new_tokens=6, prefixes=prefixes)) == want[0]


def test_threads_that_answer_at_once_disturb_no_config_and_no_draws(model: SoupModel) -> None:
    from concurrent.futures import ThreadPoolExecutor

    own = model.model.generation_config
    own.repetition_penalty = 1.7
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": True, "temperature": 1.5}
    want = {seed: model.generate(PROMPT, ["warm"], seed=seed, **options) for seed in range(4)}
    plain = model.generate(PROMPT, ["warm"], max_new_tokens=5)

    def ask(number: int) -> bool:
        if number % 3 == 0:
            return bool(model.generate(PROMPT, ["warm"], max_new_tokens=5) == plain)
        return bool(model.generate(PROMPT, ["warm"], seed=number % 4, **options) == want[number % 4])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(24)))
    assert model.model.generation_config is own
    generator = model.generator
    with ThreadPoolExecutor(4) as pool:  # without the model's lock, as others use a Generator
        list(pool.map(lambda _: generator.answers([PROMPT], max_new_tokens=2), range(8)))
    assert model.model.generation_config is own


def test_a_mixture_that_has_ended_never_reaches_the_gates(model: SoupModel) -> None:
    ids = random_ids(1, 5)
    falling = {"warm": lambda step: 3.0 - step}
    bare = _logits(model, ids)
    with model.mixture(falling) as ended:
        late = model.stream(PROMPT, max_new_tokens=4)
        outer = _logits(model, ids)
        with model.mixture({"cold": 1.0}):
            inner = _logits(model, ids)
            ended.step(1)  # a step of the outer mixture, which applies when the inner one has ended
            assert torch.equal(_logits(model, ids), inner)
        assert not torch.equal(_logits(model, ids), outer)
    with pytest.raises(UsageError, match="the mixture has ended"):
        ended.step(2)
    with pytest.raises(UsageError, match="has ended"):
        next(late)
    assert torch.equal(_logits(model, ids), bare)


def test_blocks_that_end_out_of_order_leave_no_stream_waiting(model: SoupModel) -> None:
    first, second = model.mixture({"warm": 1.0}), model.mixture({"cold": 1.0})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(UsageError, match="would wait"):
        model.stream(PROMPT, "warm")
    assert "".join(model.stream(PROMPT, max_new_tokens=3))
    second.__exit__(None, None, None)


def test_tasks_see_no_other_tasks_mixture_but_that_around_all(model: SoupModel) -> None:
    async def served() -> Any:
        return model.generate(PROMPT, max_new_tokens=3)

    async def holding() -> Any:
        with model.mixture({"warm": 3.0}):
            return (await asyncio.gather(asyncio.create_task(served()), return_exceptions=True))[0]

    assert isinstance(asyncio.run(holding()), UsageError)
    want = model.generate(PROMPT, [{"warm": 3.0}], max_new_tokens=3)
    with model.mixture({"warm": 3.0}):
        assert asyncio.run(served()) == want


def test_a_stream_is_one_row(model: SoupModel) -> None:
    with model.mixture(["warm", "cold"]), pytest.raises(UsageError, match="a stream needs a mixture with one profile"):
        next(model.stream(PROMPT))


def test_lengths_and_beams_of_ones_own_configs_count(model: SoupModel) -> None:
    from transformers import GenerationConfig

    assert model.tokenizer is not None
    width = len(model.generator.encoded(PROMPT))
    three = model.generate(PROMPT, ["warm"], max_new_tokens=3)
    assert model.generate(PROMPT, ["warm"], max_length=width + 3) == three
    assert model.generate(PROMPT, ["warm"], max_new_tokens=3, generation_config=None) == three
    with pytest.raises(UsageError, match="places"):
        model.generate([PROMPT], ["warm"], places=[0], num_beams=2)
    ids = random_ids(2, 5)
    options: dict[str, Any] = {"profiles": ["warm", "cold"], "input_ids": ids, "max_new_tokens": 4}
    beams = model.generate(num_beams=2, **options)
    model.model.generation_config = GenerationConfig(num_beams=2, eos_token_id=1, pad_token_id=2)
    assert torch.equal(model.generate(**options), beams)


def test_a_thread_that_fails_releases_the_lock(model: SoupModel) -> None:
    def fail() -> None:
        with pytest.raises(ZeroDivisionError), model.mixture("warm"):
            raise ZeroDivisionError

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert not model.layers.gates.is_on
    assert len(model.generate(PROMPT, ["cold"], max_new_tokens=2)) == 1
