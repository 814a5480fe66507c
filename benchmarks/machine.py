"""The machine that was measured, in words, and how fast it copies memory.

python -m benchmarks.machine    prints both as one JSON object
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.measure import run_process, script
from benchmarks.world import World

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy")

_COPIED_BYTES = 512 << 20
# Kinds of memory copies, with the arguments of benchmarks/ways/memory_copy.py.
ON_CPU: Mapping[str, Mapping[str, object]] = {
    "memory copy, 1 thread": {"threads": 1},
    "memory copy, 2 threads": {"threads": 2},
}
ON_GPU: Mapping[str, Mapping[str, object]] = {
    "memory copy on the GPU": {"source": "cuda", "target": "cuda"},
    "pinned memory to the GPU": {"target": "cuda"},
    "GPU to pinned memory": {"source": "cuda"},
}


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


def copy_rates(copies: Mapping[str, Mapping[str, object]], say: Callable[[str], None]) -> dict[str, str]:
    """Return the rate of each kind of memory copy, in words: no work on this machine can move bytes faster."""
    rates = {}
    for name, arguments in copies.items():
        say(name)
        report = run_process(script("memory_copy", num_bytes=_COPIED_BYTES, **arguments)).report
        rates[name] = f"{report['bytes_per_second'] / 1e9:.3g} GB/s"
    return rates


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


def main() -> None:
    """Print the description, and the rates of the GPU or, without one, of the processor."""
    described = describe(World.default().folder)
    copies = ON_GPU if "gpu" in described else ON_CPU
    print(json.dumps({**described, **copy_rates(copies, lambda _: None)}))


if __name__ == "__main__":
    main()
