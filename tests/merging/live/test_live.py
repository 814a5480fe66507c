"""Live soups compared with float64 NumPy and with merged adapters in PEFT, and the promises of `set`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from personalized_soups import ExpertLibrary, LiveAdapter, MergeOptions, Profile, merge
from personalized_soups.errors import UsageError
from tests import oracles
from tests.experts import SHAPES, write_expert
from tests.merging.live.live_soups import (
    KINDS,
    MODULE,
    NAMES,
    base_model,
    factors,
    layers,
    live_of,
    logits,
    profile_of,
    state,
    write_experts,
)
from tests.oracles import Matrix

# PEFT still uses transformers' old name; no code here can change that
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

WEIGHTS = [(0.6, 0.6, 0.6), (0.7, -0.4, 1.3), (0.0, 2.0, 0.0), (-1.0, 0.0, 0.25)]
F32 = 2.0**-24

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["free", "shared"])
def test_a_live_soup_is_the_weighted_sum_of_the_deltas(
    tmp_path: Path, small_base: Path, device: str, kind: str, weights: Sequence[float]
) -> None:
    library, live = live_of(kind, tmp_path / "experts", device)
    model = live.attach(base_model(small_base, device))
    live.set(profile_of(weights))
    folders = [library[name].folder for name in NAMES]
    want, sizes = oracles.soup(folders, weights), oracles.magnitudes(folders, weights)
    got = factors(model)
    assert got.keys() == want.keys()
    for module, (a, b) in got.items():
        # s B, w and their product are rounded, and so are both additions of three B's; A is not rounded
        assert (np.abs(b @ a - want[module]) <= 5.01 * F32 * sizes[module]).all(), module
        delta = layers(model)[module].get_delta_weight("soup").double().cpu().numpy()
        assert oracles.relative_error(delta, want[module]) < 1e-6, module
        assert layers(model)[module].scaling["soup"] == 1.0


def test_an_expert_that_lacks_modules_adds_nothing_there(tmp_path: Path, small_base: Path, device: str) -> None:
    some = {name: SHAPES[name] for name in list(SHAPES)[::2]}
    write_expert(tmp_path / "all", rank=3, seed=1, alpha_pattern={"q_proj": 5}, rank_pattern=None)
    write_expert(tmp_path / "some", rank=6, seed=2, shapes=some)
    library = ExpertLibrary.open(tmp_path)
    live = LiveAdapter(library, device=device)
    model = live.attach(base_model(small_base, device))
    assert live.rank == 9
    live.set(Profile(weights={"all": 0.3, "some": -0.9}))
    want = oracles.soup([tmp_path / "all", tmp_path / "some"], [0.3, -0.9])
    for module, (a, b) in factors(model).items():
        assert oracles.relative_error(b @ a, want[module]) < 1e-6, module
        if module not in some:
            assert not a[3:].any()
            assert not b[:, 3:].any()


def average_rule(a: list[Matrix], b: list[Matrix], s: list[float], w: Sequence[float]) -> list[tuple[Matrix, ...]]:
    """Return A and B with their magnitudes: (sum w A) / (sum w) and s sum w B."""
    total = math.fsum(w)
    pairs = [([x / total for x in w], a), ([x * s[0] for x in w], b)]
    return [_summed(coefficients, parts) for coefficients, parts in pairs]


def peft_rule(a: list[Matrix], b: list[Matrix], s: list[float], w: Sequence[float]) -> list[tuple[Matrix, ...]]:
    """Return A and B of PEFT's `linear`, with magnitudes: sum sign(w s) sqrt|w s| A and sum sqrt|w s| B."""
    roots = [math.sqrt(abs(x * y)) for x, y in zip(w, s, strict=True)]
    signed = [math.copysign(root, x * y) for root, x, y in zip(roots, w, s, strict=True)]
    return [_summed(signed, a), _summed(roots, b)]


def _summed(coefficients: Sequence[float], parts: Sequence[Matrix]) -> tuple[Matrix, Matrix]:
    products = [c * part for c, part in zip(coefficients, parts, strict=True)]
    return np.sum(products, axis=0), np.sum(np.abs(products), axis=0)


@pytest.mark.parametrize("weights", [(0.7, -0.4, 1.3), (1.0, 0.0, 0.0), (-0.2, 0.5, -0.9)])
@pytest.mark.parametrize("kind", ["average", "peft"])
def test_factor_methods_sum_as_and_bs_separately(
    tmp_path: Path, small_base: Path, device: str, kind: str, weights: Sequence[float]
) -> None:
    rule = {"average": average_rule, "peft": peft_rule}[kind]
    library, live = live_of(kind, tmp_path / "experts", device)
    model = live.attach(base_model(small_base, device))
    live.set(profile_of(weights))
    saved = [
        oracles.factors(oracles.read_tensors(library[name].folder / "adapter_model.safetensors")) for name in NAMES
    ]
    scalings = [alpha / 4 for alpha in KINDS[kind][0].get("alpha", (8, 8, 8))]
    assert live.rank == 4
    for module, found in factors(model).items():
        experts = [each[module] for each in saved]
        wanted = rule([a for a, _ in experts], [b for _, b in experts], scalings, weights)
        for got, (want, size) in zip(found, wanted, strict=True):
            # the fixed part, the coefficient and their product are rounded, and so are both additions
            assert (np.abs(got - want) <= 5.01 * F32 * size).all(), module


@every_kind
def test_a_live_soup_computes_the_merged_adapters_logits(
    tmp_path: Path, small_base: Path, device: str, kind: str
) -> None:
    library, live = live_of(kind, tmp_path / "experts", device)
    model = live.attach(base_model(small_base, device))
    plain = logits(base_model(small_base, device))
    for number, weights in enumerate([(0.7, -0.4, 1.3), (0.1, 0.2, 0.3)]):
        live.set(profile_of(weights))
        folder = merge(library, profile_of(weights), MergeOptions(method=live.method)).write(tmp_path / f"out{number}")
        merged = peft.PeftModel.from_pretrained(base_model(small_base, device), folder).eval()
        want = logits(merged)
        assert (want - plain).abs().max() > 0.05
        torch.testing.assert_close(logits(model), want, rtol=0, atol=2e-6 * float(want.abs().max()) + 2e-6)


@every_kind
def test_the_same_profile_gives_the_same_bytes_at_the_same_addresses(
    tmp_path: Path, small_base: Path, device: str, kind: str
) -> None:
    _, live = live_of(kind, tmp_path / "experts", device)
    model = live.attach(base_model(small_base, device))
    addresses = [parameter.data_ptr() for name, parameter in model.named_parameters() if "lora_" in name]
    live.set(profile_of((0.7, -0.4, 1.3)))
    first = state(model)
    live.set(profile_of((0.1, 9.0, -3.0)))
    assert state(model) != first
    live.zero()
    live.set(profile_of((0.7, -0.4, 1.3)))
    assert state(model) == first
    assert [parameter.data_ptr() for name, parameter in model.named_parameters() if "lora_" in name] == addresses
    storages = {layer.lora_B["soup"].weight.untyped_storage().data_ptr() for layer in layers(model).values()}
    assert len(storages) == 1


@every_kind
def test_a_zero_soup_is_the_base(tmp_path: Path, small_base: Path, device: str, kind: str) -> None:
    _, live = live_of(kind, tmp_path / "experts", device)
    model = live.attach(base_model(small_base, device))
    plain = logits(base_model(small_base, device))
    seen = [live.profile]
    assert torch.equal(logits(model), plain)
    profile = profile_of((0.7, -0.4, 1.3))
    live.set(profile)
    seen.append(live.profile)
    assert not torch.equal(logits(model), plain)
    live.zero()
    seen.append(live.profile)
    assert torch.equal(logits(model), plain)
    assert seen == [None, profile, None]


class Operations(TorchDispatchMode):
    """Records the name of every operation on a tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "dtype", "operations"),
    [
        ("free", "float32", ["aten.mul.out"]),
        ("free", "bfloat16", ["aten.mul.out", "aten.copy_.default"]),
        ("shared", "float32", ["aten.addmv.out"]),
        ("shared", "bfloat16", ["aten.addmv.out", "aten.copy_.default"]),
        ("average", "float32", ["aten.addmv.out", "aten.addmv.out"]),
        ("peft", "float32", ["aten.addmv.out", "aten.addmv.out"]),
    ],
)
def test_the_operations_of_set_do_not_grow_with_the_modules(
    tmp_path: Path, kind: str, dtype: str, operations: list[str]
) -> None:
    experts, settings = KINDS[kind]
    for number in (1, len(SHAPES)):
        shapes = dict(list(SHAPES.items())[:number])
        live = LiveAdapter(write_experts(tmp_path / str(number), shapes=shapes, **experts), **settings, dtype=dtype)
        with Operations() as seen:
            live.set(profile_of((0.7, -0.4, 1.3)))
        assert seen.names == operations


@every_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_set_allocates_nothing(tmp_path: Path, device: str, kind: str, dtype: str) -> None:
    _, live = live_of(kind, tmp_path, device, dtype=dtype)
    wanted = profile_of((0.7, -0.4, 1.3))
    live.set(wanted)  # cuBLAS allocates its workspace once

    def allocated(call: Callable[[], object]) -> int:
        if device == "cuda":
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            call()
            return int(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            call()
        return sum(max(event.self_cpu_memory_usage, 0) for event in seen.events() or ())

    assert allocated(lambda: torch.zeros(1000, device=device)) > 0
    assert allocated(lambda: live.set(wanted)) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["free", "shared"])
def test_a_16_bit_soup_is_rounded_once(tmp_path: Path, small_base: Path, device: str, kind: str, dtype: str) -> None:
    library, live = live_of(kind, tmp_path / "experts", device, dtype=dtype)
    model = live.attach(base_model(small_base, device))
    weights = (0.7, -0.4, 1.3)
    live.set(profile_of(weights))
    exact = LiveAdapter(library, device=device, **KINDS[kind][1])
    wanted = exact.attach(base_model(small_base, device))
    exact.set(profile_of(weights))
    for layer, other in zip(layers(model).values(), layers(wanted).values(), strict=True):
        for part, full in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
            assert part["soup"].weight.dtype == getattr(torch, dtype)
            assert torch.equal(part["soup"].weight, full["soup"].weight.to(getattr(torch, dtype)))


@pytest.fixture
def rough_products() -> Iterator[None]:
    """Let torch multiply in bfloat16 or TF32, as training scripts do: the relative errors are 2e-3 and 4e-4."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("rough_products")
def test_a_lowered_matmul_precision_has_no_effect(tmp_path: Path, small_base: Path, device: str) -> None:
    library, live = live_of("shared", tmp_path / "experts", device)
    model = live.attach(base_model(small_base, device))
    live.set(profile_of((0.7, -0.4, 1.3)))
    want = oracles.soup([library[name].folder for name in NAMES], (0.7, -0.4, 1.3))
    for module, (a, b) in factors(model).items():
        assert oracles.relative_error(b @ a, want[module]) < 1e-6, module


@pytest.mark.gpu
@every_kind
def test_a_set_does_not_overwrite_the_coefficients_of_the_set_before(
    tmp_path: Path, small_base: Path, kind: str
) -> None:
    """The coefficients stay in pinned memory until the busy device has read them."""
    _, live = live_of(kind, tmp_path / "experts", "cuda")
    model = live.attach(base_model(small_base, "cuda"))
    parameter = layers(model)[MODULE].lora_B["soup"].weight
    profiles = [profile_of((1.0, 0.1 * number, -0.2 * number)) for number in range(20)]
    wanted = []
    for expected in profiles:
        live.set(expected)
        torch.cuda.synchronize()
        wanted.append(parameter.detach().clone())
    got = []
    for queued in profiles:
        torch.cuda._sleep(10_000_000)
        live.set(queued)
        got.append(parameter.detach().clone())
    assert all(torch.equal(left, right) for left, right in zip(got, wanted, strict=True))


def test_the_adapter_is_frozen_and_set_works_while_training(tmp_path: Path, small_base: Path, device: str) -> None:
    library, live = live_of("free", tmp_path / "experts", device)
    model = live.attach(base_model(small_base, device).train())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []
    live.set(profile_of((0.7, -0.4, 1.3)))
    first = logits(model)
    model.eval()
    assert torch.equal(logits(model), first)  # no dropout
    model.set_adapter("soup")  # PEFT makes the adapter that it activates trainable
    live.set(profile_of((1.0, 0.0, 0.0)))
    alone = peft.PeftModel.from_pretrained(base_model(small_base, device), library["one"].folder)
    torch.testing.assert_close(logits(model), logits(alone), rtol=0, atol=1e-5)


def test_a_soup_created_in_inference_mode_can_be_set_outside(tmp_path: Path, small_base: Path) -> None:
    with torch.inference_mode():
        _, live = live_of("free", tmp_path / "experts", "cpu")
        model = live.attach(base_model(small_base))
        live.set(profile_of((1.0, 0.0, 0.0)))
    first = state(model)
    live.set(profile_of((2.0, 0.0, 0.0)))
    assert state(model) != first


@every_kind
def test_peft_saves_the_soup_that_is_set(tmp_path: Path, small_base: Path, device: str, kind: str) -> None:
    _, live = live_of(kind, tmp_path / "experts", device)
    model = live.attach(base_model(small_base, device), adapter="mine")
    for number, weights in enumerate([(0.7, -0.4, 1.3), (0.1, 0.2, 0.3)]):
        live.set(profile_of(weights))
        model.save_pretrained(tmp_path / str(number))
        saved = oracles.deltas(tmp_path / str(number) / "mine")
        want = {module: b @ a for module, (a, b) in factors(model, "mine").items()}
        assert saved.keys() == want.keys() == SHAPES.keys()
        for module, delta in saved.items():
            np.testing.assert_array_equal(delta, want[module])


def test_a_model_that_has_adapters_gets_one_more(tmp_path: Path, small_base: Path, device: str) -> None:
    library, live = live_of("free", tmp_path / "experts", device)
    model = peft.PeftModel.from_pretrained(base_model(small_base, device), library["one"].folder, adapter_name="own")
    own = logits(model)
    assert live.attach(model) is model
    live.set(profile_of((0.0, 1.0, 0.0)))
    second = live.attach(base_model(small_base, device))
    assert torch.equal(logits(model), logits(second))  # one soup in two models
    assert not torch.equal(logits(model), own)
    model.set_adapter("own")
    assert torch.equal(logits(model), own)
    assert [name for name, parameter in model.named_parameters() if "soup" in name and parameter.requires_grad] == []
    with pytest.raises(UsageError, match="already has an adapter called 'soup'"):
        live.attach(model)


def test_rows_are_padded_to_64_bytes(tmp_path: Path) -> None:
    """Rows of experts start at multiples of 64 bytes; the padding moves no module."""
    shapes = {"model.layers.0.mlp.up_proj": (7, 5), "model.layers.0.mlp.down_proj": (5, 7)}
    library = write_experts(tmp_path, shapes=shapes, rank=3, a_seed=1)
    live = LiveAdapter(library)
    (product,) = live._buffers.products
    assert (product.live.numel(), live.num_bytes) == (48, 4 * (3 * (7 + 5) + (3 + 1) * 48))
    weights = (0.7, -0.4, 1.3)
    live.set(profile_of(weights))
    want = oracles.soup([library[name].folder for name in NAMES], weights)
    for module, each in live._buffers.factors.items():
        assert each.b_OR.is_contiguous()
        assert oracles.relative_error((each.b_OR.double() @ each.a_RI.double()).numpy(), want[module]) < 1e-6


def test_num_bytes_counts_the_buffers(tmp_path: Path) -> None:
    library = write_experts(tmp_path / "free", rank=(2, 5, 3))
    width, height = (sum(shape[side] for shape in SHAPES.values()) for side in (1, 0))
    assert LiveAdapter(library).num_bytes == 4 * 10 * (width + 2 * height)
    assert LiveAdapter(library, dtype="bfloat16").num_bytes == 2 * 10 * (width + height) + 2 * 4 * 10 * height
    shared = write_experts(tmp_path / "shared", a_seed=1)
    assert LiveAdapter(shared).num_bytes == 4 * 4 * (width + (3 + 1) * height)
    assert LiveAdapter(shared, method="factor_average").num_bytes == 4 * 4 * (3 + 1) * (width + height)
