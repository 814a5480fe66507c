"""The GPU's kernel: on the CPU through Triton's interpreter, and on a GPU itself against the plain operations."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from personalized_soups.mixing import fused
from tests.mixing.worlds import LOGITS, open_model, random_ids, relative, true_logits, write_experts, write_shared

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton has no build for this platform")
def test_the_kernel_in_tritons_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted.py")],
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted is not None
    assert int(counted[1]) == 24


def test_layers_hand_the_kernel_what_it_takes(
    tmp_path: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused path through a whole model, the kernel replaced by its formula: views, columns, several spans."""
    calls = 0

    def add(y: Any, low: Any, gate: Any, b: Any, columns: Any) -> None:
        nonlocal calls
        calls += 1
        assert y.is_contiguous()
        assert low.is_contiguous()
        assert gate.stride(1) == b.stride(1) == 1
        spread = low if columns is None else low[:, columns]
        y += (spread * gate.repeat_interleave(len(y) // len(gate), dim=0)) @ b

    monkeypatch.setattr(fused, "is_usable", lambda y, low: y.is_contiguous() and low.is_contiguous())
    monkeypatch.setattr(fused, "add_gated", add)
    ids = random_ids(2, 5)
    rows: list[dict[str, float] | None] = [{"cold": 0.7}, {"cold": -0.2, "warm": 1.0}]
    for write in (write_experts, write_shared):
        folders = write(tmp_path / write.__name__)
        model = open_model(small_base, folders[0].parent)
        with torch.no_grad(), model.mixture(rows):
            got = model(input_ids=ids).logits
        for row, weights in enumerate(rows):
            assert relative(got[row], true_logits(small_base, folders, weights, ids[row])) < LOGITS
    assert calls == 16


class _OnGpu:
    """What is_usable looks at of a tensor that is on a GPU, where there is none."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, is_cuda: bool = True, contiguous: bool = True) -> None:
        self.dtype, self.is_cuda, self._contiguous = dtype, is_cuda, contiguous

    def is_contiguous(self) -> bool:
        return self._contiguous


def test_it_is_left_alone_where_it_cannot_help(monkeypatch: pytest.MonkeyPatch) -> None:
    usable: Any = fused.is_usable
    monkeypatch.setattr(fused, "_has_triton", lambda: True)
    with torch.no_grad():
        assert usable(_OnGpu(), _OnGpu())
        assert not usable(_OnGpu(is_cuda=False), _OnGpu())
        assert not usable(_OnGpu(), _OnGpu(dtype=torch.float16))
        assert not usable(_OnGpu(contiguous=False), _OnGpu())
        assert not usable(_OnGpu(), _OnGpu(contiguous=False))
    with torch.enable_grad():
        assert not usable(_OnGpu(), _OnGpu())
    monkeypatch.setattr(fused, "_has_triton", lambda: False)
    with torch.no_grad():
        assert not usable(_OnGpu(), _OnGpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("write", [write_experts, write_shared])
def test_on_a_gpu_it_gives_what_plain_operations_give(
    tmp_path: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, write: Any
) -> None:
    folders = write(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts", device="cuda", dtype=dtype)
    ids = random_ids(4, 9).cuda()
    rows: list[dict[str, float] | None] = [{"cold": 0.7}, None, {"plain": 1.0}, {"cold": -0.2, "warm": 1.0}]
    with torch.no_grad(), model.mixture(rows):
        got = model(input_ids=ids).logits
        monkeypatch.setattr(fused, "is_usable", lambda *_: False)
        plain = model(input_ids=ids).logits
    owed = LOGITS if dtype == "float32" else 8 * torch.finfo(torch.bfloat16).eps
    assert relative(got, plain) < owed
    for row, weights in enumerate(rows):
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
