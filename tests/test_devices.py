from __future__ import annotations

import pytest
import torch

from personalized_soups.devices import MERGE_DEVICES, resolve_device, torch_dtype
from personalized_soups.errors import UsageError


@pytest.mark.parametrize("kinds", [None, MERGE_DEVICES])
def test_auto_is_cuda_if_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, kinds: tuple[str, ...] | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto", kinds=kinds) == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto", kinds=kinds) == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("toaster", "unknown device 'toaster'"),
        ("", "unknown device ''"),
        ("cuda;", "unknown device 'cuda;'"),
        ("cuda:2", "there is no device 'cuda:2' on this machine: torch sees 2 CUDA devices"),
        ("cuda:99999999999", "there is no device 'cuda:99999999999'"),
        ("meta", "the device 'meta' can't compute"),
    ],
)
def test_a_device_that_cannot_be_used_is_rejected(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=message) as caught:
        resolve_device(device)
    assert caught.value.where == "device"


def test_a_kind_that_is_not_accepted_is_rejected() -> None:
    with pytest.raises(UsageError, match="unknown device 'meta'") as caught:
        resolve_device("meta", kinds=MERGE_DEVICES)
    assert caught.value.mend == "choose from: auto, cpu, cuda, cuda:N"


def test_cuda_without_a_gpu_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="there is no device 'cuda' on this machine"):
        resolve_device("cuda")


def test_dtypes_are_torchs() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16
