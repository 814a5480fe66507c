"""mergekit in an environment of its own, made once on top of this one: both run the same torch and transformers."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measure import MissingError

VERSION = "0.1.5"

_READY_FILE = "ready.json"
_INSTALL_SECONDS = 900


def command(environment: Path, base: Path, experts: Path, weights: Mapping[str, float], out: Path) -> Sequence[str]:
    """Return the command by which a user merges experts into their base, and write its configuration next to `out`.

    Every adapter is named `base+adapter`: mergekit folds each into a copy of the base before it merges the copies. The
    copies are made again for each run, as they are for each new set of experts. Weights must sum to 1.
    """
    lines = ["merge_method: linear", "dtype: bfloat16", "models:"]
    for name, weight in weights.items():
        lines += [f"  - model: {base}+{experts / name}", f"    parameters: {{weight: {weight}}}"]
    configuration = out.parent / "mergekit.yaml"
    configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")
    cache = out.parent / "lora-cache"
    # the synthetic base has no tokenizer to copy
    return [
        str(environment / "bin" / "mergekit-yaml"),
        str(configuration),
        str(out),
        "--lora-merge-cache",
        str(cache),
        "--no-copy-tokenizer",
        "--quiet",
    ]


def install(environment: Path) -> None:
    """Make the environment where it is not there.

    Raises:
        MissingError: saying why it cannot be installed.
    """
    wanted = {"mergekit": VERSION, "python": sys.executable, "torch": importlib.metadata.version("torch")}
    try:
        if json.loads((environment / _READY_FILE).read_text(encoding="utf-8")) == wanted:
            return
    except (FileNotFoundError, ValueError):
        pass
    shutil.rmtree(environment, ignore_errors=True)
    environment.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(environment)])
    python = str(environment / "bin" / "python")
    # This environment's packages come after its own on the path, so that pip does not download a second torch.
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "beneath.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _run(
        [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", f"mergekit=={VERSION}"]
        + [f"{package}=={importlib.metadata.version(package)}" for package in ("torch", "transformers", "peft")]
    )
    (environment / _READY_FILE).write_text(json.dumps(wanted), encoding="utf-8")


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingError(f"mergekit cannot be installed: {error}") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise MissingError(f"mergekit cannot be installed: {reason}")
