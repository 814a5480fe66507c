"""Experts, profiles and weights that change while a model lives, also compiled and with several threads."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from personalized_soups import ExpertLibrary, Profile, SoupModel
from personalized_soups.errors import DeclarationError, IncompatibleExpertsError, UsageError
from personalized_soups.mixing.diffusers_view import DiffusersView
from tests.experts import SHAPES, write_expert
from tests.mixing.worlds import LOGITS, open_model, random_ids, relative, true_logits, write_shared


def test_experts_are_added_and_removed(model: SoupModel, folders: list[Path], tmp_path: Path, small_base: Path) -> None:
    ids = random_ids(2, 6)
    far = write_expert(tmp_path / "more" / "far", seed=9, rank=5, shapes={"model.layers.1.mlp.gate_proj": (96, 64)})
    assert "model.layers.1.mlp.gate_proj" not in model.layers.by_name
    assert model.experts.add(far) == "far"
    assert list(model.experts) == ["cold", "far", "plain", "warm"]
    rows: list[dict[str, float]] = [{"far": 0.7, "cold": 0.5}, {"warm": 1.0}]
    with torch.no_grad(), model.mixture(rows):
        got = model(input_ids=ids).logits
    for row, weights in enumerate(rows):
        assert relative(got[row], true_logits(small_base, [*folders, far], weights, ids[row])) < LOGITS
    model.experts.remove("far")
    assert "model.layers.1.mlp.gate_proj" not in model.layers.by_name
    model.experts.remove("cold")
    with pytest.raises(DeclarationError, match="'cold'"), model.mixture([{"cold": 1.0}]):
        pass
    with torch.no_grad(), model.mixture([None, {"warm": 1.0}]):
        assert relative(model(input_ids=ids).logits[1], true_logits(small_base, folders, rows[1], ids[1])) < LOGITS
    replacement = write_expert(tmp_path / "new" / "warm", seed=77, rank=6)
    model.experts.add(replacement)
    with torch.no_grad(), model.mixture(rows[1:]):
        assert (
            relative(model(input_ids=ids[1:]).logits[0], true_logits(small_base, [replacement], rows[1], ids[1]))
            < LOGITS
        )
    assert model.experts.add(folders[0], name="icy") == "icy"
    with torch.no_grad(), model.mixture(["icy"]):
        want = true_logits(small_base, folders, {"cold": 1.0}, ids[0])
        assert relative(model(input_ids=ids[:1]).logits[0], want) < LOGITS


def test_an_expert_still_shares_its_a_after_others_are_removed(tmp_path: Path, small_base: Path) -> None:
    folders = write_shared(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    model.experts.remove("cold")
    model.experts.add(write_expert(tmp_path / "more" / "free", seed=5, rank=2))
    (stack, *_) = [layer.stack for layer in model.layers.by_name.values()]
    assert (stack.a_CI.shape[0], stack.b_KO.shape[0]) == (4 + 2, 4 + 2 + 4)
    ids = random_ids(1, 6)
    weights = {"plain": 0.4, "warm": -0.8, "free": 1.0}
    with torch.no_grad(), model.mixture([weights]):
        got = model(input_ids=ids).logits[0]
    want = true_logits(small_base, [*folders[1:], tmp_path / "more" / "free"], weights, ids[0])
    assert relative(got, want) < LOGITS


def test_an_expert_that_does_not_fit_changes_nothing(model: SoupModel, tmp_path: Path) -> None:
    before = {name: layer.stack for name, layer in model.layers.by_name.items()}
    wrong = write_expert(tmp_path / "more" / "wrong", shapes={"model.layers.0.self_attn.q_proj": (64, 32)})
    with pytest.raises(IncompatibleExpertsError):
        model.experts.add(wrong)
    assert {name: layer.stack for name, layer in model.layers.by_name.items()} == before
    with pytest.raises(UsageError, match="must hold one expert, but it holds"):
        model.experts.add(tmp_path / "experts")
    with pytest.raises(UsageError, match="no expert is called 'wrm'"):
        model.experts.remove("wrm")
    with model.mixture("warm"), pytest.raises(UsageError, match="cannot change while a mixture is set"):
        model.experts.remove("warm")


def test_unused_experts_are_not_computed(model: SoupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personalized_soups.mixing.layers.stack._WORTH_A_GAP", 0)
    ids = random_ids(2, 3)
    for layer in model.layers.by_name.values():
        layer.put(layer.stack)

    def columns() -> list[tuple[int, int]]:
        used = model.layers.gates.used
        return [
            (span.start, span.stop)
            for span in model.layers.by_name["model.layers.0.self_attn.q_proj"].stack.spans(used)
        ]

    with model.mixture([{"cold": 1.0}, {"warm": 0.5}]), torch.no_grad():
        assert columns() == [(0, 4), (6, 9)]
        apart = model(input_ids=ids).logits
    monkeypatch.setattr("personalized_soups.mixing.layers.stack._WORTH_A_GAP", 1 << 30)
    for layer in model.layers.by_name.values():
        layer.put(layer.stack)
    with model.mixture([{"cold": 1.0}, {"warm": 0.5}]), torch.no_grad():
        assert columns() == [(0, 9)]
        assert relative(apart, model(input_ids=ids).logits) < LOGITS
    with model.mixture([None, None]):
        assert columns() == []


def test_setting_weights_moves_no_buffer_and_copies_no_factor(model: SoupModel) -> None:
    layers = list(model.layers.by_name.values())
    gates = model.layers.gates
    with model.mixture(["cold", "warm"]):
        before = [(gates.of(layer.slot).data_ptr(), layer.stack.a_CI.data_ptr()) for layer in layers]
    with profiled(activities=[ProfilerActivity.CPU], profile_memory=True) as seen, model.mixture(["warm", None]):
        pass
    # The largest new tensor is a buffer of gates, with K columns for each layer: far smaller than one stack.
    most = max(event.self_cpu_memory_usage for event in seen.events())
    assert 0 < most <= 2 * 4 * sum(layer.stack.width for layer in layers)
    with model.mixture(["warm", None]):
        assert [(gates.of(layer.slot).data_ptr(), layer.stack.a_CI.data_ptr()) for layer in layers] == before


@pytest.mark.slow
def test_weights_are_data_to_a_compiled_model(model: SoupModel, folders: list[Path], small_base: Path) -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    ids = random_ids(2, 6)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.model, backend=backend, fullgraph=True, dynamic=False)
    rows: list[list[dict[str, float] | None]] = [
        [{"cold": 0.4}, {"warm": 1.0}],
        [None, {"plain": -1.0, "cold": 2.0}],
        [None, None],
        [{"warm": 0.1}, {"warm": 0.2, "cold": 0.3, "plain": 0.4}],
    ]
    for batch in rows:
        with torch.no_grad(), model.mixture(batch):
            got = compiled(input_ids=ids, use_cache=False).logits
        for row, weights in enumerate(batch):
            assert relative(got[row], true_logits(small_base, folders, weights, ids[row])) < LOGITS
    assert graphs == 1
    with torch.no_grad(), model.mixture([{"warm": {"*.mlp.*": 0.5}}, "cold"]):
        compiled(input_ids=ids, use_cache=False)
    assert graphs == 1
    with torch.no_grad():
        bare = compiled(input_ids=ids, use_cache=False).logits
    assert graphs == 2  # the bare base is another graph
    assert relative(bare[0], true_logits(small_base, folders, None, ids[0])) < LOGITS


@pytest.mark.slow
def test_a_compiled_model_notices_added_experts(
    model: SoupModel, folders: list[Path], tmp_path: Path, small_base: Path
) -> None:
    ids = random_ids(1, 6)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.model, backend="eager", dynamic=False)
    with torch.no_grad(), model.mixture(["warm"]):
        compiled(input_ids=ids, use_cache=False)
    far = write_expert(
        tmp_path / "more" / "far", seed=9, rank=5, shapes={"model.layers.1.mlp.gate_proj": (96, 64), **SHAPES}
    )
    model.experts.add(far)
    with torch.no_grad(), model.mixture(["far"]):
        got = compiled(input_ids=ids, use_cache=False).logits[0]
    assert relative(got, true_logits(small_base, [far], {"far": 1.0}, ids[0])) < LOGITS


def test_diffusers_calls(model: SoupModel, folders: list[Path], small_base: Path) -> None:
    ids = random_ids(2, 6)

    def logits() -> Any:
        with torch.no_grad():
            return model(input_ids=ids).logits

    view = DiffusersView(model)
    bare = logits()
    view.set_adapters(["cold", "warm"], [0.5, 0.8])
    assert view.get_active_adapters() == ["cold", "warm"]
    want = [true_logits(small_base, folders, {"cold": 0.5, "warm": 0.8}, row) for row in ids]
    assert max(relative(got, true) for got, true in zip(logits(), want, strict=True)) < LOGITS
    with model.mixture([None, "warm"]):
        assert relative(logits()[0], true_logits(small_base, folders, None, ids[0])) < LOGITS
    assert relative(logits()[0], want[0]) < LOGITS
    view.disable_adapters()
    assert view.get_active_adapters() == []
    assert torch.equal(logits(), bare)
    view.enable_adapters()
    model.experts.set_scale("cold", 3.0)
    tripled = true_logits(small_base, folders, {"cold": 1.5, "warm": 0.8}, ids[0])
    assert relative(logits()[0], tripled) < LOGITS
    with model.mixture([{"cold": 0.5, "warm": 0.8}] * 2):
        assert relative(logits()[0], tripled) < LOGITS
    model.experts.set_scale("cold", 1.0)
    view.set_adapters("warm", {"*.mlp.*": 1.0})
    layered = logits()
    view.set_adapters("warm")
    assert not torch.equal(layered, logits())
    view.delete_adapters("warm")
    assert torch.equal(logits(), bare)
    calls: tuple[Callable[[], None], ...] = (
        lambda: view.set_adapters(["cold", "plain"], [1.0]),
        lambda: view.set_adapters("wrm"),
        lambda: model.experts.set_scale("wrm", 1.0),
    )
    for call in calls:
        with pytest.raises(UsageError):
            call()
    with pytest.raises(DeclarationError, match="not a finite number"):
        model.experts.set_scale("cold", float("nan"))


def test_cache_keys_follow_weights_experts_and_scales(model: SoupModel, folders: list[Path]) -> None:
    model.profiles.add(Profile(user="u1", weights={"cold": 0.5}))
    keys = [model.cache_key(who) for who in (None, "u1", "warm", {"cold": 0.6}, {"cold": {"*": 0.5}})]
    assert len(set(keys)) == 5
    assert model.cache_key({"cold": 0.5, "warm": 0.0}) == model.cache_key("u1")
    assert model.cache_key({"cold": lambda step: 0.5 + step}) == model.cache_key("u1")
    model.profiles.add(Profile(user="u1", weights={"cold": 0.7}))
    assert model.cache_key("u1") not in keys
    before = model.cache_key("cold"), model.cache_key("warm")
    model.experts.add(folders[0])
    assert (model.cache_key("cold") != before[0], model.cache_key("warm") == before[1]) == (True, True)
    model.experts.set_scale("warm", 2.0)
    assert model.cache_key("warm") != before[1]
    model.profiles.remove("u1")
    with pytest.raises(UsageError, match="no profile is called 'u1'"):
        model.profiles.remove("u1")


def test_a_batch_sees_one_version_of_everything(model: SoupModel) -> None:
    """Another thread replaces a profile and an expert while a batch is generated: the batch does not see them."""
    ids = random_ids(2, 6)
    model.profiles.add(Profile(user="u1", weights={"cold": 0.5}))
    model.profiles.add(Profile(user="u2", weights={"warm": 0.5}))
    options: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 24, "eos_token_id": None}
    want = model.generate(profiles=["u1", "u2"], **options)
    begun = threading.Event()
    events: list[str] = []

    def change() -> None:
        begun.wait()
        model.profiles.add(Profile(user="u1", weights={"cold": -3.0}))
        events.append("profile")
        with model.mixture(["plain"]):
            events.append("mixture")
        model.experts.remove("plain")

    def note(*_: Any) -> None:
        begun.set()
        events.append("forward")

    thread = threading.Thread(target=change)
    thread.start()
    handle = model.model.register_forward_hook(note)
    got = model.generate(profiles=["u1", "u2"], **options)
    thread.join()
    handle.remove()
    assert torch.equal(got, want)
    assert events == ["forward"] * 24 + ["profile", "mixture"]  # the changes waited for the batch
    assert not torch.equal(model.generate(profiles=["u1", "u2"], **options), want)


def test_a_model_that_is_cast_takes_its_stacks_along(model: SoupModel, folders: list[Path], small_base: Path) -> None:
    ids = random_ids(1, 6)
    model.model.double()
    weights = {"cold": 0.5, "warm": -1.0}
    with torch.no_grad(), model.mixture([weights]):
        got = model(input_ids=ids).logits[0]
    assert got.dtype == torch.float64
    assert (
        relative(got, true_logits(small_base, folders, weights, ids[0])) < 1e-6
    )  # the factors' scalings are float32's


def test_the_memory_of_a_user(model: SoupModel) -> None:
    """A user is E numbers: nothing else grows with the named profiles that are not in the batch."""
    before = model.layers.num_bytes
    profiles = [
        Profile(user=f"u{number}", weights={"cold": number + 1.0, "plain": 0.1 * number, "warm": 0.3}, normalize="sum")
        for number in range(500)
    ]
    tracemalloc.start()
    for profile in profiles:
        model.profiles.add(profile)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.layers.num_bytes == before
    assert len(model.profiles) == 500
    assert taken / 500 < 1000
    model.experts.remove("plain")
    with pytest.raises(DeclarationError, match="no expert is called 'plain'"), model.mixture(["u7"]):
        pass


def test_several_experts_change_at_once_or_not_at_all(
    model: SoupModel, folders: list[Path], tmp_path: Path, small_base: Path
) -> None:
    ids = random_ids(1, 6)
    write_expert(tmp_path / "new" / "warm", seed=77, rank=6)
    write_expert(tmp_path / "new" / "more", seed=78)
    fresh = ExpertLibrary.open(tmp_path / "new")
    model.experts.change(list(fresh.values()), ["cold"])
    assert list(model.experts) == ["more", "plain", "warm"]
    with torch.no_grad(), model.mixture([{"warm": 1.0, "more": -0.5}]):
        got = model(input_ids=ids).logits[0]
    new = [tmp_path / "new" / "warm", tmp_path / "new" / "more"]
    assert relative(got, true_logits(small_base, new, {"warm": 1.0, "more": -0.5}, ids[0])) < LOGITS
    with pytest.raises(UsageError, match="'nobody'"):
        model.experts.change([], ["nobody"])
    write_expert(tmp_path / "odd" / "odd", shapes={"model.layers.0.mlp.up_proj": (7, 64)})
    with pytest.raises(IncompatibleExpertsError):
        model.experts.change([ExpertLibrary.open(tmp_path / "odd")["odd"]], ["plain"])
    assert list(model.experts) == ["more", "plain", "warm"]
    with torch.no_grad(), model.mixture([{"plain": 0.5}]):
        assert (
            relative(model(input_ids=ids).logits[0], true_logits(small_base, folders, {"plain": 0.5}, ids[0])) < LOGITS
        )


def test_resolved_weights_are_not_checked_again(model: SoupModel, small_base: Path) -> None:
    row = model.resolve({"warm": 0.7, "cold": -0.2})
    assert model.resolve(row) is row
    ids = random_ids(2, 5)
    with torch.no_grad():
        with model.mixture([row, model.resolve(None)]):
            got = model(input_ids=ids).logits
        with model.mixture([{"warm": 0.7, "cold": -0.2}, None]):
            assert torch.equal(got, model(input_ids=ids).logits)
        with model.mixture(row):  # one for all rows
            assert torch.equal(got[:1], model(input_ids=ids[:1]).logits)
    assert model.resolve({"warm": {"*.mlp.*": 0.5}}).weights == {"warm": {"*.mlp.*": 0.5}}
    for odd, what in (
        ({"wam": 1.0}, "'wam'"),
        ("nobody", "'nobody'"),
        ({"warm": float("nan")}, "not a finite number"),
        ({"warm": {"*.nothing.*": 0.5}}, "nothing"),
        (Profile(weights={"warm": 1.0}, method="ties"), "ties"),
    ):
        with pytest.raises((DeclarationError, UsageError), match=what):
            model.resolve(odd)
    model.experts.remove("plain")
    again = model.resolve(row)
    assert again == row
    assert again is not row  # the experts have changed, so the names were checked again
    model.experts.remove("warm")
    with pytest.raises(DeclarationError, match="'warm'"), model.mixture([row]):
        pass


def test_weights_that_do_not_fit_into_the_models_dtype_are_rejected_before_they_are_set(
    folders: list[Path], small_base: Path
) -> None:
    half = open_model(small_base, folders[0].parent, dtype="float16")
    most = torch.finfo(torch.float16).max
    scaling = 8 / 4  # of `cold`: alpha over rank
    half.resolve({"cold": 0.99 * most / scaling})
    for weights in ({"cold": 1.01 * most / scaling}, {"warm": 0.1, "cold": -1.01 * most / scaling}):
        with pytest.raises(UsageError, match="'cold'"):
            half.resolve(weights)
    # `resolve` does not wait for a mixture that another thread has set
    with half.mixture([{"warm": 0.1}]), ThreadPoolExecutor(1) as pool:
        assert pool.submit(half.resolve, {"cold": 0.5}).result() == half.resolve({"cold": 0.5})
