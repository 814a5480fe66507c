"""Groups of layers compute what the layers compute separately, also while the base changes.

A group keeps its base's weights in a buffer of its own. Each test tries one change that could make the buffer stale, or
that the shared product could skip.
"""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from personalized_soups import SoupModel
from personalized_soups.mixing.layers import grouping, weight_group
from personalized_soups.mixing.layers.grouping import in_slot_order
from personalized_soups.mixing.layers.groups import LayerGroup
from personalized_soups.mixing.layers.weight_group import WeightGroup
from tests.experts import SHAPES, write_expert
from tests.mixing.worlds import LOGITS, open_model, random_ids, relative, true_logits, write_experts, write_shared

ROWS: list[dict[str, float] | None] = [{"cold": 0.6, "warm": 0.5}, None, {"plain": 1.3}, {"cold": -0.7, "warm": 1.1}]
IDS = random_ids(len(ROWS), 7)
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def group_of(model: SoupModel, name: str = Q) -> LayerGroup:
    group = model.layers.by_name[name].group
    assert isinstance(group, LayerGroup)
    return group


def logits(model: SoupModel, ids: Tensor = IDS, rows: Any = ROWS) -> Tensor:
    with torch.no_grad(), model.mixture(rows):
        result: Tensor = model(input_ids=ids).logits
    return result


def ungrouped(model: SoupModel) -> Tensor:
    """Return the logits that the layers give separately."""
    layers = model.layers.by_name.values()
    before = [layer.group for layer in layers]
    for layer in layers:
        layer.group = None
    try:
        with torch.no_grad(), model.mixture(ROWS):
            for layer in layers:
                layer.group = None
            result: Tensor = model(input_ids=IDS).logits
    finally:
        for layer, group in zip(layers, before, strict=True):
            layer.group = group
    return result


def check_right(model: SoupModel, base: Path, folders: list[Path], limit: float = LOGITS) -> None:
    got = logits(model)
    for row, weights in enumerate(ROWS):
        assert relative(got[row], true_logits(base, folders, weights, IDS[row])) < limit


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record each product with a weight or an A, by the number of the matrix's rows."""
    heights: list[int] = []
    real = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        heights.append(len(weight))
        return real(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    return heights


def test_layers_that_read_alike_are_one_group(model: SoupModel) -> None:
    by_layer = {name: layer.group for name, layer in model.layers.by_name.items()}
    assert by_layer[Q] is by_layer[K] is not None
    assert len({id(group) for group in by_layer.values()}) == 6  # q and k, up, down, of two blocks
    assert all(group is not None and group.has_weights for group in by_layer.values())
    # the slots of a group are consecutive
    slots = [layer.slot for layer in group_of(model).layers]
    assert slots == list(range(slots[0], slots[0] + 2))


def test_names_are_in_the_order_of_their_calls() -> None:
    names = [f"m.{leaf}" for leaf in ("up_proj", "k_proj", "o_proj", "q_proj", "gate_proj", "v_proj")]
    assert in_slot_order([*names, "n.k_proj", "plain"]) == [
        ["m.gate_proj", "m.up_proj"],
        ["m.q_proj", "m.k_proj", "m.v_proj"],
        ["m.o_proj"],
        ["n.k_proj"],
        ["plain"],
    ]


@pytest.mark.parametrize("write", [write_experts, write_shared])
@pytest.mark.parametrize("way", ["one product", "two products", "A's alone"])
def test_each_way_of_computing_a_group_is_right(
    tmp_path: Path,
    small_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    products: list[int],
    *,
    write: Callable[[Path], list[Path]],
    way: str,
) -> None:
    """A's in the weights' buffer; A's that do not fit there and take a second product; A's without weights."""
    if way == "two products":
        monkeypatch.setattr(weight_group, "_ROOM", 0)
        monkeypatch.setattr(weight_group, "_FEW_NUMBERS", 0)
    if way == "A's alone":
        monkeypatch.setattr(grouping, "_MOST_NUMBERS_ON_CPU", 0)
    folders = write(tmp_path / "experts")
    model = open_model(small_base, folders[0].parent)
    check_right(model, small_base, folders)
    products.clear()
    logits(model)
    low = sum(len(layer.stack.a_CI) for layer in group_of(model).layers)
    padded = -(-low // 16) * 16
    expected = {"one product": [96 + padded], "two products": [96, low], "A's alone": [low, 64, 32]}[way]
    assert products[: len(expected)] == expected


def test_a_batch_that_uses_few_ranks_multiplies_no_others(
    model: SoupModel, small_base: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, products: list[int]
) -> None:
    monkeypatch.setattr(grouping, "_MOST_NUMBERS_ON_CPU", 0)
    monkeypatch.setattr("personalized_soups.mixing.layers.stack._WORTH_A_GAP", 0)
    model = open_model(small_base, folders[0].parent)
    got = logits(model, IDS[:1], [{"warm": 1.0}])
    assert relative(got[0], true_logits(small_base, folders, {"warm": 1.0}, IDS[0])) < LOGITS
    assert products[:4] == [64, 3, 32, 3]  # q and its A of rank 3, k and its own
    products.clear()
    logits(model, IDS[:1], [{"warm": 1.0, "cold": 1.0}])
    assert products[0] == 2 * (4 + 3) + 2  # both A's at once; `plain` adapts one of the two layers


@pytest.mark.parametrize("change", ["to", "half", "weight", "data", "assign"])
def test_a_weight_that_is_replaced_is_noticed(
    model: SoupModel, small_base: Path, folders: list[Path], tmp_path: Path, change: str
) -> None:
    before = logits(model)
    layer = model.model.get_submodule(Q).base_layer
    if change == "to":
        model.model.to(torch.float64)
        check_right(model, small_base, folders, limit=1e-6)
        assert group_of(model).is_current()
        model.model.to(torch.float32)
    elif change == "half":
        model.model.half()
        assert relative(logits(model), before) < 0.05
        model.model.float()
        assert relative(logits(model), before) < 0.05
        return
    elif change == "weight":
        layer.weight = nn.Parameter(layer.weight.detach() * 2)
    elif change == "data":
        layer.weight.data = layer.weight.data * 2
    else:
        changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        changed[f"{Q}.weight"] *= 2
        model.load_state_dict(changed, assign=True)
    # noticed at once, and by the group that the next mixture makes
    with torch.no_grad(), model.mixture(ROWS):
        at_once = model(input_ids=IDS).logits
    want = ungrouped(model)
    assert relative(at_once, want) < LOGITS
    assert relative(logits(model), want) < LOGITS
    assert group_of(model).is_current()
    if change != "to":
        assert relative(want, before) > 1e-3


def test_a_weight_that_is_replaced_within_a_mixture_is_noticed(model: SoupModel) -> None:
    layer = model.model.get_submodule(Q).base_layer
    with torch.no_grad(), model.mixture(ROWS):
        model(input_ids=IDS)
        layer.weight.data = layer.weight.data * 2
        within = model(input_ids=IDS).logits
    assert relative(within, ungrouped(model)) < LOGITS


def test_a_state_that_is_loaded_goes_into_the_buffer(model: SoupModel) -> None:
    before = logits(model)
    group = group_of(model)
    changed = {
        name: tensor * 2 if name == f"{Q}.weight" else tensor.clone() for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(changed)
    assert group_of(model) is group
    assert group.is_current()
    assert relative(logits(model), before) > 1e-3
    assert relative(logits(model), ungrouped(model)) < LOGITS


@pytest.mark.slow
def test_compiled_code_notices_a_weight_that_is_replaced(model: SoupModel) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.model, backend="eager", fullgraph=True, dynamic=False)

    def run() -> Tensor:
        with torch.no_grad(), model.mixture(ROWS):
            result: Tensor = compiled(input_ids=IDS, use_cache=False).logits
        return result

    before = run()
    layer = model.model.get_submodule(Q).base_layer
    layer.weight.data = layer.weight.data * 2
    after = run()
    assert relative(after, before) > 1e-3
    assert relative(after, ungrouped(model)) < LOGITS


def _doubled(_module: nn.Module, _x: Any, y: Tensor) -> Tensor:
    return 2 * y


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward", "global"])
@pytest.mark.parametrize("is_early", [True, False])
def test_hooks_on_the_bases_layers_are_called(
    folders: list[Path], small_base: Path, kind: str, *, is_early: bool
) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval()
    layer = base.get_submodule(K)
    calls = 0

    def put_on() -> Any:
        def seen(*_: Any) -> None:
            nonlocal calls
            calls += 1

        if kind == "hook":
            return layer.register_forward_hook(_doubled)
        if kind == "pre-hook":
            return layer.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))
        if kind == "global":
            return nn.modules.module.register_module_forward_hook(
                lambda module, _x, _y: seen() if module is layer else None
            )
        own = layer.forward
        layer.forward = lambda x: 2 * own(x)  # as accelerate does it
        return None

    handle = put_on() if is_early else None
    model = SoupModel(base, folders[0].parent)
    plain = logits(model) if not is_early else None
    handle = handle if is_early else put_on()
    try:
        with torch.no_grad(), model.mixture(ROWS):
            got = model(input_ids=IDS).logits
        if kind == "global":
            assert calls == 1
        else:
            assert relative(got, ungrouped(model)) < LOGITS
            if plain is not None:
                assert relative(got, plain) > 1e-3
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.slow
def test_a_compiled_model_calls_a_hook_that_comes_later(model: SoupModel) -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.model, backend="eager", dynamic=False)

    def run() -> Tensor:
        with torch.no_grad(), model.mixture(ROWS):
            result: Tensor = compiled(input_ids=IDS, use_cache=False).logits
        return result

    before = run()
    model.model.get_submodule(K).base_layer.register_forward_hook(_doubled)
    torch._dynamo.reset()
    assert relative(run(), before) > 1e-3
    assert relative(run(), ungrouped(model)) < LOGITS


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_product_is_for_the_same_input_alone(model: SoupModel, mode: Any) -> None:
    """Layers of one group get different inputs, in any order, and more than once."""
    q, k = (model.model.get_submodule(name) for name in (Q, K))
    with mode(), model.mixture(ROWS):
        x_1, x_2 = torch.randn(2, len(ROWS), 3, 64)
        want = {}
        for name, layer in (("q", q), ("k", k)):
            group, layer.group = layer.group, None
            want[name] = layer(x_1), layer(x_2)
            layer.group = group
        for call in "q1 k2 . k2 q1 . q1 q2 k1 k2 . q1 q1 k1 k1 . k1 q2 k2 q1".replace(" .", "").split():
            layer, place = (q if call[0] == "q" else k), int(call[1]) - 1
            assert relative(layer((x_1, x_2)[place]), want[call[0]][place]) < LOGITS, call


def test_an_input_that_changes_between_two_layers_is_another_one(model: SoupModel) -> None:
    q, k = (model.model.get_submodule(name) for name in (Q, K))
    with torch.no_grad(), model.mixture(ROWS):
        x = torch.randn(len(ROWS), 3, 64)
        q(x)
        before = k(x)
        q(x)
        x += 1
        after = k(x)
        k.group = None
        assert relative(after, k(x)) < LOGITS
        assert relative(after, before) > 1e-2


def test_the_next_pass_over_the_same_input_multiplies_again(model: SoupModel) -> None:
    """Inference mode does not count changes in place, so a product must not outlive its forward pass."""
    q = model.model.get_submodule(Q)
    with torch.inference_mode(), model.mixture(ROWS):
        x = torch.randn(len(ROWS), 3, 64)
        before = q(x)  # and k takes nothing
        x += 1
        after = q(x)
        q.group = None
        assert relative(after, q(x)) < LOGITS
        assert relative(after, before) > 1e-2


def test_a_pass_that_fails_leaves_no_product(model: SoupModel) -> None:
    k = model.model.get_submodule(K)
    seen: list[weakref.ref[Tensor]] = []

    def fail(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(weakref.ref(inputs[0]))
        raise ZeroDivisionError

    handle = k.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), model.mixture(ROWS):
        model(input_ids=IDS)
    assert model.layers.gates.held is None
    handle.remove()
    gc.collect()
    assert seen[0]() is None
    # also while the mixture stays set
    with torch.no_grad(), model.mixture(ROWS):
        handle = k.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=IDS)
        handle.remove()
        got = model(input_ids=IDS).logits
        assert model.layers.gates.held is None
    assert torch.equal(got, logits(model))


def test_two_threads_in_one_mixture_take_their_own_products(model: SoupModel) -> None:
    batches = [random_ids(len(ROWS), 5, seed=seed) for seed in range(2)]
    wrong: list[int] = []
    with torch.no_grad(), model.mixture(ROWS):
        want = [model(input_ids=ids).logits for ids in batches]

        def run(place: int) -> None:
            with torch.no_grad():
                wrong.extend(
                    place for _ in range(20) if not torch.equal(model(input_ids=batches[place]).logits, want[place])
                )

        threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_the_base_has_its_own_bits_when_no_mixture_is_set(model: SoupModel, small_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval()
    with torch.no_grad():
        want = bare(input_ids=IDS).logits
        logits(model)
        assert torch.equal(model(input_ids=IDS).logits, want)
        assert group_of(model).has_weights
        unloaded = model.unload()
        assert torch.equal(unloaded(input_ids=IDS).logits, want)
    for mine, theirs in zip(unloaded.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.untyped_storage().nbytes() == mine.nbytes  # its own again
    copy.deepcopy(unloaded)


def test_what_is_saved_is_the_bases_bytes(model: SoupModel, small_base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = model.state_dict()
    assert state[f"{Q}.weight"].untyped_storage().data_ptr() == state[f"{K}.weight"].untyped_storage().data_ptr()
    save_file(state, tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path / "saved")
    want = load_file(small_base / "model.safetensors")
    for file in (tmp_path / "state.safetensors", tmp_path / "saved" / "model.safetensors"):
        got = load_file(file)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert model.model.get_submodule(Q).weight is model.model.get_submodule(Q).base_layer.weight


def test_adding_and_removing_experts_moves_no_weight(
    model: SoupModel, folders: list[Path], tmp_path: Path, small_base: Path, products: list[int]
) -> None:
    """Their A's use the room behind the weights, and larger A's a second product."""
    group, address = group_of(model), model.model.get_submodule(Q).weight.data_ptr()
    more = [write_expert(tmp_path / "more" / f"more{number}", seed=20 + number, rank=40) for number in range(2)]
    for expert in (*more, None):
        if expert is not None:
            model.experts.add(expert)
        else:
            for folder in more:
                model.experts.remove(folder.name)
        assert group_of(model) is group
        assert model.model.get_submodule(Q).weight.data_ptr() == address
        weights = dict.fromkeys(model.experts, 0.3)
        products.clear()
        got = logits(model, IDS[:1], [weights])
        named = [*folders, *(more[: len(weights) - 3])]
        assert relative(got[0], true_logits(small_base, named, weights, IDS[0])) < LOGITS
        assert (products[0] == 96) is (expert is not None)  # weights alone: the A's do not fit behind them any more
        held = sum(layer.stack.num_bytes for layer in model.layers.by_name.values())
        assert model.layers.num_bytes >= held


def test_room_is_counted(model: SoupModel) -> None:
    layers = model.layers.by_name.values()
    stacks = sum(layer.stack.num_bytes for layer in layers)
    spare = {id(layer.group): layer.group.num_spare_bytes for layer in layers if isinstance(layer.group, LayerGroup)}
    assert all(spare.values())
    assert model.layers.num_bytes == stacks + sum(spare.values())


def _base_with(small_base: Path, change: Callable[[nn.Module], None]) -> Any:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval()
    change(base.get_submodule(Q))
    return base


def _mapped(layer: Any) -> None:
    whole = torch.empty(2 * layer.weight.numel())
    part = whole[layer.weight.numel() :].view_as(layer.weight)
    layer.weight = nn.Parameter(part.copy_(layer.weight.detach()))


def _subclass(layer: Any) -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    layer.__class__ = Other


def _parametrised(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer)


@pytest.mark.parametrize("change", [_mapped, _subclass, _parametrised])
def test_layers_that_are_more_than_a_linear_map_keep_their_weights(
    folders: list[Path], small_base: Path, change: Callable[[nn.Module], None]
) -> None:
    base = _base_with(small_base, change)
    model = SoupModel(base, folders[0].parent)
    assert not group_of(model).has_weights
    assert group_of(model, "model.layers.1.self_attn.q_proj").has_weights
    check_right(model, small_base, folders)


def test_a_tied_weight_stays_where_it_is(folders: list[Path], small_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval()
    other = base.get_submodule("model.layers.1.self_attn.q_proj")
    other.weight = nn.Parameter(base.get_submodule(Q).weight.data)  # another parameter over the same numbers
    model = SoupModel(base, folders[0].parent)
    assert not group_of(model).has_weights
    with torch.no_grad():
        model.model.get_submodule(Q).weight.mul_(2)
    assert torch.equal(model.model.get_submodule(Q).weight, other.weight)
    assert relative(logits(model), ungrouped(model)) < LOGITS


def test_biases_move_with_their_weights(tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=2, eos_token_id=1,
    )  # fmt: skip
    base: Any = Qwen2ForCausalLM(config).eval()
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    base.save_pretrained(tmp_path / "base")
    folders = write_experts(tmp_path / "experts")
    model = open_model(tmp_path / "base", folders[0].parent)
    bare = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert group_of(model).has_weights
    check_right(model, tmp_path / "base", folders)
    for name, parameter in model.unload().named_parameters():
        assert torch.equal(parameter, bare[name])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_a_layer_with_dora_is_computed_by_itself(tmp_path: Path, small_base: Path) -> None:
    from tests.mixing.test_variants import _true, _write_dora

    one = {Q: SHAPES[Q]}
    folders = {
        "dora": _write_dora(tmp_path / "experts" / "dora", small_base, 1, shapes=one),
        "plain": write_expert(tmp_path / "experts" / "plain", seed=3),
    }
    model = open_model(small_base, tmp_path / "experts")
    assert model.layers.by_name[Q].group is None
    assert group_of(model, K).layers == (model.layers.by_name[K],)
    rows: list[dict[str, float] | None] = [{"plain": 0.9}, None, {"plain": -0.4}]
    got = logits(model, IDS[:3], rows)
    plain = {"plain": folders["plain"]}
    for row, weights in enumerate(rows):
        assert relative(got[row], _true(small_base, plain, weights, IDS[row], turned=False)) < LOGITS


def test_gradients_and_autocast_take_each_layer_by_itself(model: SoupModel, products: list[int]) -> None:
    want = logits(model)
    products.clear()
    with model.mixture(ROWS):
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        got = model(inputs_embeds=embedded).logits
    assert products[:4] == [64, 9, 32, 7]  # q and its A's, k and its A's
    assert relative(got.detach(), want) < LOGITS
    got.square().sum().backward()
    assert embedded.grad is not None
    products.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), model.mixture(ROWS):
        half = model(input_ids=IDS).logits
    assert products[:4] == [64, 9, 32, 7]
    assert relative(half, want) < 0.05


def test_packed_sequences_and_beams_have_their_gates_in_groups(model: SoupModel) -> None:
    rows = torch.tensor([[0, 0, 2, 3, 1, 1, 3]] * 2)
    ids = random_ids(2, 7)
    with torch.no_grad(), model.mixture(ROWS, rows=rows):
        packed = model(input_ids=ids).logits
        for layer in model.layers.by_name.values():
            layer.group = None
        assert relative(model(input_ids=ids).logits, packed) < LOGITS


@pytest.mark.parametrize("place", ["buffers", "A's", "B's"])
def test_memory_that_runs_out_leaves_every_layer_right(
    model: SoupModel,
    folders: list[Path],
    small_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    place: str,
) -> None:
    """While groups are made, and while an expert is added to one layer of a group: the other A's do not change."""
    real_cat, real_init, calls = torch.cat, WeightGroup.__init__, 0

    def full(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > (1 if place == "B's" else 0):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")  # what a CPU raises
        return (real_init if place == "buffers" else real_cat)(*arguments, **keywords)

    one = write_expert(tmp_path / "more" / "one", seed=9, shapes={Q: SHAPES[Q]})
    with monkeypatch.context() as patched:
        if place == "buffers":
            patched.setattr(WeightGroup, "__init__", full)
        else:
            patched.setattr("personalized_soups.mixing.layers.weight_group.torch.cat", full)
        with pytest.warns(RuntimeWarning, match="memory ran out"):
            made = open_model(small_base, folders[0].parent)
        calls = 0
        if place != "buffers":
            with pytest.warns(RuntimeWarning, match="memory ran out"):
                model.experts.add(one)
    check_right(made, small_base, folders)
    check_right(model, small_base, folders)
    if place != "buffers":
        assert list(model.experts) == ["cold", "one", "plain", "warm"]
        # earlier compiled code would continue with the tensors of the group
        assert model.layers.by_name[Q].group is model.layers.by_name[K].group is None
        assert model.model.get_submodule(Q).weight.untyped_storage().nbytes() == 4 * 64 * 64
        got = logits(model, IDS[:1], [{"one": 1.0, "cold": 0.5}])
        want = true_logits(small_base, [*folders, one], {"one": 1.0, "cold": 0.5}, IDS[0])
        assert relative(got[0], want) < LOGITS
    for parameter in made.unload().parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.`:UserWarning")  # it runs a global hook once more
@pytest.mark.parametrize("change", ["data", "assign", "hook", "global hook"])
def test_compiled_code_with_a_served_profile_notices_changes_of_the_base(model: SoupModel, change: str) -> None:
    """A served profile starts no mixture, so compiled code must notice changes itself."""
    model.served.set({"cold": 0.6, "warm": 0.5})
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.model, backend="eager", dynamic=False)

    def run(called: Any) -> Tensor:
        with torch.no_grad():
            result: Tensor = called(input_ids=IDS, use_cache=False).logits
        return result

    before = run(compiled)
    layer = model.model.get_submodule(Q).base_layer
    handle = None
    if change == "data":
        layer.weight = nn.Parameter(layer.weight.detach() * 2)
    elif change == "assign":
        changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        changed[f"{Q}.weight"] *= 2
        model.load_state_dict(changed, assign=True)
    elif change == "hook":
        layer.register_forward_hook(_doubled)
        torch._dynamo.reset()  # guards on hooks are off by default, for every layer
    else:
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, _x, y: 2 * y if module is model.model.get_submodule(Q).base_layer else None
        )
        torch._dynamo.reset()
    try:
        after = run(compiled)
        assert relative(after, before) > 1e-3
        assert relative(after, run(model.model)) < LOGITS
    finally:
        if handle is not None:
            handle.remove()


def test_weights_by_layer_keep_their_layers_while_layers_are_cast(model: SoupModel) -> None:
    """A mixture that is set has a weight for each slot, so slots must not depend on dtypes."""
    k = model.model.get_submodule(K)
    with torch.no_grad(), model.mixture({"warm": {"*.k_proj": 1.0}}):
        want = model(input_ids=IDS).logits
        k.to(torch.float64)
        with model.mixture(None):
            pass
        k.to(torch.float32)
        assert relative(model(input_ids=IDS).logits, want) < LOGITS


def test_layers_of_several_dtypes_have_gates_of_their_own(model: SoupModel) -> None:
    block = model.model.model.layers[1].mlp
    up, down = (model.model.get_submodule(f"model.layers.1.mlp.{name}_proj") for name in ("up", "down"))
    block.double()
    with torch.no_grad(), model.mixture(ROWS):
        x = torch.randn(len(ROWS), 3, 64, dtype=torch.float64)
        got = down(up(x))
        up.group = down.group = None
        assert relative(got, down(up(x))) < LOGITS


def test_one_layer_under_two_names_keeps_its_weight(tmp_path: Path, small_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_expert(tmp_path / "experts" / "warm", seed=3, shapes={Q: SHAPES[Q], K: SHAPES[K]})
    base: Any = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval()
    other = base.model.layers[1].self_attn
    other.k_proj = base.get_submodule(K)
    model = SoupModel(base, folder.parent)
    assert not group_of(model).has_weights
    with torch.no_grad(), model.mixture("warm"):
        before = model(input_ids=IDS).logits
        other.k_proj.weight.mul_(2)
        after = model(input_ids=IDS).logits
        for layer in model.layers.by_name.values():
            layer.group = None
        assert relative(after, model(input_ids=IDS).logits) < LOGITS
    assert relative(after, before) > 1e-3


def test_a_class_that_is_patched_is_called(model: SoupModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = logits(model), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * real(self, x))
    assert relative(logits(model), before) > 1e-3
    assert relative(logits(model), ungrouped(model)) < LOGITS


def test_weights_that_were_released_in_inference_mode_can_be_trained(model: SoupModel) -> None:
    handle = model.model.get_submodule(Q).base_layer.register_forward_hook(lambda *_: None)
    with torch.inference_mode(), model.mixture(ROWS):
        model(input_ids=IDS)
    handle.remove()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.model.get_submodule(K).weight.grad is not None


def test_a_model_that_is_moved_keeps_nothing_of_what_it_was(model: SoupModel) -> None:
    layers = model.layers.by_name.values()
    buffers = [weakref.ref(layer.group._rows_MI) for layer in layers if isinstance(layer.group, WeightGroup)]
    assert len(buffers) == len(list(layers))
    model.model.double()
    gc.collect()
    assert not any(buffer() is not None for buffer in buffers)
    assert all(layer.weight.untyped_storage().nbytes() == layer.weight.nbytes for layer in layers)
    assert model.layers.num_bytes == sum(layer.stack.num_bytes for layer in layers)


def test_weights_that_others_share_stay_where_they_are(small_base: Path, folders: list[Path]) -> None:
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval()
    base.share_memory()
    model = SoupModel(base, folders[0].parent)
    assert all(parameter.is_shared() for parameter in model.model.parameters())
    check_right(model, small_base, folders)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_functions_of_the_weights_are_computed_by_each_layer(model: SoupModel) -> None:
    q = model.model.get_submodule(Q)
    weights = torch.stack([q.base_layer.weight.detach() * factor for factor in (1.0, 2.0)])
    with torch.no_grad(), model.mixture(ROWS):
        x = torch.randn(len(ROWS), 3, 64)
        call = torch.func.functional_call
        got = torch.func.vmap(lambda weight: call(q, {"base_layer.weight": weight}, (x,)))(weights)
        assert relative(got[0], q(x)) < LOGITS
        assert relative(got[1], q(x)) > 1e-2


def test_a_warning_that_is_an_error_leaves_experts_and_names_agreed(
    model: SoupModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_group: LayerGroup) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    more = write_expert(tmp_path / "more" / "added", seed=9)
    monkeypatch.setattr(WeightGroup, "hold", full)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="memory ran out"):
            model.experts.add(more)
    assert "added" in model.experts
    assert model.resolve("added").weights == {"added": 1.0}
    assert relative(logits(model), ungrouped(model)) < LOGITS
