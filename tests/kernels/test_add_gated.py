"""Gate and second product: the kernel in Triton's interpreter, where it fails, under torch.compile, and on a GPU."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalized_soups import SoupModel
from personalized_soups.kernels import add_gated as kernel
from personalized_soups.kernels import launching
from tests.kernels.interpreter import needs_triton, num_passed
from tests.mixing.worlds import LOGITS, open_model, random_ids, relative, true_logits, write_experts, write_shared

ROWS: list[dict[str, float] | None] = [{"cold": 0.7}, None, {"plain": 1.0}, {"cold": -0.2, "warm": 1.0}]


@needs_triton
def test_the_kernel_in_tritons_interpreter() -> None:
    assert num_passed("interpreted_add_gated.py") == 24


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launches be tried with tensors of the CPU; each test says what becomes of them."""
    monkeypatch.setattr(launching._State, "has_failed", False)
    monkeypatch.setattr(launching, "is_usable", lambda _: not launching._State.has_failed)


def _logits(model: SoupModel, ids: Tensor, rows: Sequence[dict[str, float] | None]) -> Tensor:
    with torch.no_grad(), model.mixture(list(rows)):
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("write", [write_experts, write_shared])
@pytest.mark.parametrize("is_grouped", [True, False])
def test_layers_hand_the_kernel_what_it_takes(
    tmp_path: Path,
    small_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], list[Path]],
    *,
    is_grouped: bool,
) -> None:
    """A whole model, the launch replaced by the kernel's formula over its tiles: views, columns, several layers."""
    calls = 0

    def launch(y_NO: Tensor, low_NC: Tensor, gate_GK: Tensor, factors: kernel.BlockDiagonal) -> None:
        nonlocal calls
        calls += 1
        assert y_NO.stride(1) == low_NC.stride(1) == gate_GK.stride(1) == factors.tiles.stride(1) == 1
        b = factors.blocks[0]
        # what a pointer to the first block reaches
        flat = b.as_strided((b.untyped_storage().nbytes() // b.element_size() - b.storage_offset(),), (1,))
        for first_output, num_outputs, first_rank, end_rank, first_b, b_stride in factors.tiles.tolist():
            columns = torch.arange(first_rank, end_rank)
            columns = columns if factors.columns_K is None else factors.columns_K[columns]
            gates = gate_GK[:, first_rank:end_rank].repeat_interleave(len(y_NO) // len(gate_GK), dim=0)
            ranks = end_rank - first_rank
            block = flat[first_b:].as_strided((ranks, num_outputs), (b_stride, 1), flat.storage_offset() + first_b)
            y_NO[:, first_output : first_output + num_outputs] += (low_NC[:, columns] * gates) @ block

    monkeypatch.setattr(kernel, "launch", launch)
    ids = random_ids(4, 5)
    folders = write(tmp_path / "experts")
    model = open_model(small_base, folders[0].parent)
    if not is_grouped:
        for layer in model.layers.by_name.values():
            layer.group = None
    got = _logits(model, ids, ROWS)
    for row, weights in enumerate(ROWS):
        assert relative(got[row], true_logits(small_base, folders, weights, ids[row])) < LOGITS
    # q, k, v and gate, up are one call each
    layers = list(model.layers.by_name)
    assert calls == (len({layer.group for layer in model.layers.by_name.values()}) if is_grouped else len(layers))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_kernel_that_fails_is_warned_of_once_and_changes_no_number(
    tmp_path: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, folders[0].parent)
    ids = random_ids(4, 5)
    tried = 0

    def launch(*_: Any) -> None:
        nonlocal tried
        tried += 1
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(kernel, "launch", launch)
    with pytest.warns(RuntimeWarning, match="Failed to find C compiler") as caught:
        got = _logits(model, ids, ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = _logits(model, ids, ROWS)
    assert len(caught) == tried == 1
    monkeypatch.setattr(launching, "is_usable", lambda _: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = _logits(model, ids, ROWS)
    assert torch.equal(got, want)
    assert torch.equal(again, want)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_memory_that_runs_out_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        launching.launched(launch, torch.zeros(1))
    assert not launching._State.has_failed


class _OnGpu:
    """What `is_usable` looks at of a tensor on a GPU, where there is none."""

    is_cuda = True


def test_kernels_are_for_gpus_with_triton_until_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = _OnGpu()
    monkeypatch.setattr(launching, "_has_triton", lambda: True)
    assert launching.is_usable(on_gpu)
    assert not launching.is_usable(torch.zeros(1))
    monkeypatch.setattr(launching._State, "has_failed", True)
    assert not launching.is_usable(on_gpu)
    monkeypatch.setattr(launching._State, "has_failed", False)
    monkeypatch.setattr(launching, "_has_triton", lambda: False)
    assert not launching.is_usable(on_gpu)


def test_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    launching._has_triton.cache_clear()
    assert launching._has_triton()
    launching._has_triton.cache_clear()
    monkeypatch.setenv("PSOUPS_FUSED", "0")
    assert not launching._has_triton()
    launching._has_triton.cache_clear()


def _compiled_graphs(model: SoupModel, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[torch.fx.GraphModule]]:
    """Return the model compiled such that add_gated is the operator, as on a GPU, and the graphs that come of it."""
    monkeypatch.setattr(kernel, "_is_traced_on_gpu", lambda _: torch.compiler.is_compiling())
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model.model, backend=backend, fullgraph=True, dynamic=False), graphs


@pytest.mark.slow
def test_torch_compile_keeps_one_graph_with_the_operator_in_it(
    tmp_path: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, folders[0].parent)
    compiled, graphs = _compiled_graphs(model, monkeypatch)
    ids = random_ids(4, 5)
    for rows in (ROWS, ROWS[::-1]):
        with torch.no_grad(), model.mixture(rows):
            got = compiled(input_ids=ids, use_cache=False).logits
        for row, weights in enumerate(rows):
            assert relative(got[row], true_logits(small_base, folders, weights, ids[row])) < LOGITS
    assert len(graphs) == 1
    operators = [str(node.target) for node in graphs[0].graph.nodes if "add_gated" in str(node.target)]
    groups = {layer.group for layer in model.layers.by_name.values()}
    assert operators == ["personalized_soups.add_gated.default"] * len(groups)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_calls_the_operator_and_copies_no_product(
    tmp_path: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the operator is called by its name, on the very buffer that the product was written to."""
    from torch._inductor.utils import run_and_get_code

    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, folders[0].parent)
    monkeypatch.setattr(kernel, "_is_traced_on_gpu", lambda _: torch.compiler.is_compiling())
    torch._dynamo.reset()
    compiled: Any = torch.compile(model.model, fullgraph=True, dynamic=False)
    ids = random_ids(4, 5)
    # by this process: a pool of compilers takes longer to start than to compile
    with torch._inductor.config.patch(compile_threads=1), torch.no_grad(), model.mixture(ROWS):
        got, (code,) = run_and_get_code(lambda: compiled(input_ids=ids, use_cache=False).logits)
    for row, weights in enumerate(ROWS):
        assert relative(got[row], true_logits(small_base, folders, weights, ids[row])) < LOGITS
    calls = re.findall(r"add_gated\.default\((buf\d+), reinterpret_tensor\((buf\d+),", code)
    assert len(calls) == len({layer.group for layer in model.layers.by_name.values()})
    for y, low in calls:
        assert y == low
        assert re.search(rf"extern_kernels\.mm\(.*, out={y}\)", code)


def test_the_operator_does_what_torchs_own_checks_ask_of_one() -> None:
    draw = torch.Generator().manual_seed(0)
    y, low, gate = (torch.randn(4, size, generator=draw) for size in (12, 6, 6))
    blocks = [torch.randn(4, 8, generator=draw), torch.randn(2, 4, generator=draw)]
    factors = kernel.BlockDiagonal.of(blocks, [0, 8])
    arguments = (y, low, gate, blocks, [0, 8], None, factors.tiles, factors.is_aligned)
    torch.library.opcheck(kernel.add_gated_operator, arguments, test_utils=("test_schema", "test_faketensor"))
    want = y + (low * gate) @ torch.block_diag(*blocks)
    kernel.add_gated_operator(*arguments)
    assert relative(y, want) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("write", [write_experts, write_shared])
def test_on_a_gpu_it_gives_what_plain_operations_give(
    tmp_path: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, write: Any
) -> None:
    folders = write(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts", device="cuda", dtype=dtype)
    ids = random_ids(4, 9).cuda()
    got = _logits(model, ids, ROWS)
    assert not launching._State.has_failed
    monkeypatch.setattr(launching, "is_usable", lambda _: False)
    plain = _logits(model, ids, ROWS)
    owed = LOGITS if dtype == "float32" else 8 * torch.finfo(torch.bfloat16).eps
    assert relative(got, plain) < owed
    for row, weights in enumerate(ROWS):
        assert relative(got[row], true_logits(small_base, folders, weights, ids[row].cpu())) < 8 * owed


@pytest.mark.gpu
def test_a_cuda_graph_sees_new_weights(tmp_path: Path, small_base: Path) -> None:
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts", device="cuda")
    ids = random_ids(2, 5).cuda()
    rows: list[list[dict[str, float] | None]] = [
        [{"cold": 0.7}, {"warm": 1.0}],
        [{"plain": -1.0, "cold": 0.1, "warm": 0.2}, None],
    ]
    with torch.no_grad(), model.mixture([{"cold": 1.0, "warm": 1.0, "plain": 1.0}] * 2):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(input_ids=ids, use_cache=False).logits
    for batch in rows:
        with model.mixture(batch):
            graph.replay()
        for row, weights in enumerate(batch):
            assert relative(out[row], true_logits(small_base, folders, weights, ids[row].cpu())) < LOGITS


@pytest.mark.gpu
def test_static_caches_compile_once_and_answer_alike(tmp_path: Path, small_base: Path) -> None:
    write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts", device="cuda")
    ids = random_ids(2, 5).cuda()
    options: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 8, "eos_token_id": None}
    for profiles in (["cold", "warm"], [None, {"plain": 0.5}]):
        plain = model.generate(profiles=profiles, **options)
        assert torch.equal(model.generate(profiles=profiles, cache_implementation="static", **options), plain)
