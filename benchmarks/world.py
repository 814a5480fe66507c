"""The synthetic world: bases and experts of real shapes, written once, kept, and used again.

All values are random and none is zero, so that nothing is easier than with trained tensors.

R rank, I in features, O out features.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.shapes import NUM_EXPERTS, RANK, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from personalized_soups.files.writer import TensorSpec

Kind = Literal["base", "free", "shared"]

_SHARD_BYTES = 512 << 20
_SEED = 0
_STD = 0.02
_SETTINGS_FILE = "settings.json"

# Values of a base are cut from one random block, each tensor at a place of its own; a prime length, so that rows which
# wrap around the block's end are not those of another tensor.
_BLOCK = 33_554_467


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the world: a base model, or the experts of a shape (free, or with one basis for all)."""

    shape: Shape
    kind: Kind

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes on the disk."""
        return self.shape.base_bytes if self.kind == "base" else self.shape.expert_bytes * NUM_EXPERTS

    @property
    def settings(self) -> dict[str, object]:
        """What it was made with: a part is used again only where this agrees."""
        return {
            "format": 1,
            "kind": self.kind,
            "config": self.shape.config(),
            "rank": RANK,
            "experts": NUM_EXPERTS,
            "std": _STD,
            "seed": _SEED,
            "shard_bytes": _SHARD_BYTES,
        }


@dataclass(frozen=True, slots=True)
class World:
    """A folder of parts, of outputs that come and go, and of mergekit's environment."""

    folder: Path

    @classmethod
    def default(cls) -> World:
        """Return the world in $PSOUPS_BENCH_DIR, or in the system's folder for temporary files."""
        return cls(Path(os.environ.get("PSOUPS_BENCH_DIR") or Path(tempfile.gettempdir()) / "psoups-bench").absolute())

    def base(self, shape: Shape) -> Path:
        """Return the folder of a base."""
        return self._folder(Part(shape, "base"))

    def experts(self, shape: Shape, basis: Literal["free", "shared"] = "free") -> Path:
        """Return the folder of a shape's experts, e0 to e5."""
        return self._folder(Part(shape, basis))

    @property
    def outputs(self) -> Path:
        """Where outputs are written; each is deleted once it is measured."""
        return self.folder / "outputs"

    @property
    def mergekit(self) -> Path:
        """Mergekit's own environment."""
        return self.folder / "mergekit"

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts that are not there, or were made with other settings."""
        return [part for part in dict.fromkeys(parts) if not self._is_built(part)]

    def build(self, part: Part) -> None:
        """Write a part again."""
        folder = self._folder(part)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if part.kind == "base":
            _write_base(folder, part.shape)
        else:
            _write_experts(folder, part.shape, shared=part.kind == "shared")
        # last, so that an interrupted part has none and is written again
        (folder / _SETTINGS_FILE).write_text(json.dumps(part.settings), encoding="utf-8")

    def _is_built(self, part: Part) -> bool:
        try:
            found = json.loads((self._folder(part) / _SETTINGS_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        return bool(found == part.settings)

    def _folder(self, part: Part) -> Path:
        return self.folder / "worlds" / part.shape.name / part.kind


def check_space(world: World, parts: Sequence[Part], scratch_bytes: int) -> tuple[int, int]:
    """Return the bytes that a run will need and those that are free.

    Raises:
        SystemExit: if they do not suffice; the message says how many are missing.
    """
    needed = sum(part.num_bytes for part in world.missing(parts)) + scratch_bytes
    world.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(world.folder).free
    if free < needed:
        raise SystemExit(
            f"error: the run needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free\n"
            f"   at: {world.folder}\n mend: set PSOUPS_BENCH_DIR to a folder on a larger disk"
        )
    return needed, free


def _write_base(folder: Path, shape: Shape) -> None:
    import torch

    from personalized_soups.files.writer import write_safetensors

    block = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(_SEED)).mul_(_STD).to(torch.bfloat16)
    shards = list(_shards(shape))
    places = {}
    for number, specs in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = ((spec.name, _cut(block, spec)) for spec in specs)
        write_safetensors(folder / file, specs, tensors, {"format": "pt"})
        places.update({spec.name: file for spec in specs})
    index = {"metadata": {"total_size": shape.base_bytes}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", shape.config())
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def _shards(shape: Shape) -> Iterator[list[TensorSpec]]:
    from personalized_soups.files.writer import TensorSpec

    specs: list[TensorSpec] = []
    for name, sizes in shape.base_tensors():
        specs.append(TensorSpec(name, "BF16", sizes))
        if sum(spec.num_bytes for spec in specs) >= _SHARD_BYTES:
            yield specs
            specs = []
    if specs:
        yield specs


def _cut(block: Tensor, spec: TensorSpec) -> Tensor:
    """Return a tensor of the block's values from a place that its name decides; norms are about 1, as in models."""
    import torch

    start = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:4], "little") % block.numel()
    num = spec.num_bytes // 2
    if num <= block.numel() - start:
        values = block[start : start + num]
    else:
        values = torch.cat([block[start:], block.repeat(num // block.numel() + 1)])[:num]
    return (values + 1 if len(spec.shape) == 1 else values).reshape(spec.shape)


def _write_experts(folder: Path, shape: Shape, *, shared: bool) -> None:
    import torch

    from personalized_soups.files.writer import spec_of, write_safetensors

    for number in range(NUM_EXPERTS):
        # a basis is shared where A's generator begins alike for all experts
        of_a = torch.Generator().manual_seed(_SEED + 1 if shared else 1000 + number)
        of_b = torch.Generator().manual_seed(2000 + number)
        tensors = {}
        for name, (num_out, num_in) in shape.modules.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, num_in, generator=of_a).mul_(_STD)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_out, RANK, generator=of_b).mul_(_STD)
        expert = folder / f"e{number}"
        expert.mkdir()
        specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
        write_safetensors(expert / "adapter_model.safetensors", specs, tensors.items(), {"format": "pt"})
        _write_json(expert / "adapter_config.json", _adapter_config(shape))


def _adapter_config(shape: Shape) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"synthetic-{shape.name}",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in shape.modules}),
    }


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
