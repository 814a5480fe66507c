"""The machine that was measured, in words."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")


def describe(folder: Path) -> dict[str, str]:
    """Return what a reader must know of the machine; `folder` is where files are written."""
    import torch

    described = {
        "processor": f"{_of_file('/proc/cpuinfo', 'model name') or platform.processor()}, {os.cpu_count()} cores",
        "memory": f"{int((_of_file('/proc/meminfo', 'MemTotal') or '0 kB').split()[0]) / 2**20:.1f} GiB",
        "file system": _file_system(folder),
        "system": f"{platform.system()} {platform.release()}",
        "torch threads": str(torch.get_num_threads()),
        "versions": ", ".join([f"python {platform.python_version()}", *_versions()]),
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        described["gpu"] = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    return described


def load() -> float:
    """Return the load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def _versions() -> list[str]:
    return [f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES]


def _of_file(file: str, key: str) -> str | None:
    if sys.platform != "linux":
        return None
    for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() == key:
            return value.strip()
    return None


def _file_system(folder: Path) -> str:
    """Return the kind of the file system that holds a folder: the mount with the longest path above it."""
    if sys.platform != "linux":
        return "unknown"
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    above = [(len(place), kind) for place, kind in mounts if folder.resolve().is_relative_to(place)]
    return max(above, default=(0, "unknown"))[1]
