"""A soup folded into its base: a full model folder, written while the base is read, tensor by tensor.

I in features, O out features, R rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personalized_soups.adapters.compatible import is_same_base
from personalized_soups.adapters.fingerprint import base_fingerprint, base_folder
from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.adapters.names import base_weight_name
from personalized_soups.adapters.provenance import SOUP_FILE, BaseRecord, SoupRecord, library_versions, write_record
from personalized_soups.bank import ExpertBank
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import (
    IncompatibleExpertsError,
    InputError,
    UnsupportedAdapterError,
    choose_from,
)
from personalized_soups.files.atomic import MARKERS, check_replaceable, files_below, new_folder
from personalized_soups.files.digest import BackgroundDigests
from personalized_soups.files.reader import PICKLES, parse_json
from personalized_soups.files.shards import INDEX, Checkpoint
from personalized_soups.files.writer import TensorSpec, write_safetensors
from personalized_soups.merging.adapter import check_output_apart, input_records, soup_factors
from personalized_soups.merging.plan import MergePlan, plan_merge, resolve_device
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.table import Method

_FOLDABLE = frozenset({"F64", "F32", "F16", "BF16"})

# Weights in other forms would stay those of the base alone: they are left out of the new folder.
_OTHER_WEIGHTS = PICKLES | {".safetensors", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".tflite", ".ot"}

# Rows of the output that are computed at once: 64 MiB of float32 at 4096 columns.
_ROWS = 4096

_MAX_SHOWN = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False, slots=True)
class _Target:
    """A base model that a soup fits: its opened weight files, and the adapted tensors with their modules."""

    folder: Path
    checkpoint: Checkpoint
    module_of: Mapping[str, str]


def merge_into_base(
    library: ExpertLibrary,
    profile: Profile,
    base: Path | str,
    out: Path | str,
    *,
    method: str | Method | None = None,
    device: str = "auto",
    same_base: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the base with the soup of `profile` added to it as a model folder, and return the folder.

    Adapted tensors are accumulated in float32 (float64 where the base is) and rounded once to the base's dtype; every
    other tensor is copied byte for byte, in the base's own order and shards, and so is every file that holds no
    weights. Memory: one tensor at a time.

    Args:
        library: where the experts are.
        profile: who it is for.
        base: the base model's folder, or a hub id in the local cache.
        out: the new folder.
        method: overrides the profile's.
        device: where the arithmetic is done: auto (the CPU), cpu, cuda.
        same_base: take it that this is the experts' base, whatever the fingerprints say.
        overwrite: replace `out` where this tool wrote it.
        progress: called with the bytes of tensors done and in all.

    Raises:
        SoupError: everything that plan_merge raises; IncompatibleExpertsError where an adapted module is not in the
            base or of another shape; UnsupportedAdapterError where it is tied or quantised.
    """
    plan = plan_merge(library, profile, method=method, same_base=same_base, into_base=True)
    device_used = resolve_device(device)
    out = Path(out)
    check_replaceable(out.absolute(), overwrite=overwrite)
    target = _target(plan, base)
    experts = [library[expert.name] for expert in plan.experts]
    fingerprint = base_fingerprint(target.folder)
    if not same_base:
        _check_fingerprints(experts, base, fingerprint)
    check_output_apart(out, [str(target.folder), *(expert.folder for expert in plan.experts)])
    bank = ExpertBank(experts, device=device_used)
    read = [path for expert in experts for path in expert.adapter.files]
    shards = [shard.path for shard in target.checkpoint.shards.values()]
    with new_folder(out, overwrite) as scratch, BackgroundDigests([*read, *shards]) as digests:
        _write_shards(plan, bank, target, scratch, progress)
        _copy_others(target.folder, scratch)
        done = digests.results()
        write_record(
            scratch,
            SoupRecord(
                kind="model",
                profile=profile.model_dump(mode="json"),
                method=plan.method.name,
                encoding="folded",
                experts=input_records(plan, library, done),
                base=BaseRecord(name=str(base), fingerprint=fingerprint),
                base_blake3={path.name: done[path] for path in shards},
                dtype=", ".join(sorted({target.checkpoint.entry(name).dtype for name in target.module_of})),
                device=str(device_used),
                versions=library_versions("torch", "numpy"),
                files=tuple(sorted({SOUP_FILE, *files_below(scratch)})),
            ),
        )
    return out


def check_fits(plan: MergePlan, base: Path | str) -> None:
    """Raise if a soup cannot be folded into `base`, from headers alone: what a dry run can know.

    Fingerprints are not compared: that reads the base's weights.

    Raises:
        SoupError: as merge_into_base does for a base that is not there, damaged, quantised, tied or of other shapes.
    """
    _target(plan, base)


def folded(w_OI: Tensor, factors: Factors) -> Tensor:
    """Return `W + s B A` in W's shape and dtype, a new tensor on the factors' device.

    Accumulated in float32 (float64 where W is float64) and rounded once. Rows are computed in blocks of fixed size.
    """
    dtype = torch.float64 if w_OI.dtype == torch.float64 else torch.float32
    a_RI = factors.a_RI.to(dtype)
    b_OR = factors.b_OR.to(dtype)
    result = torch.empty(w_OI.shape, dtype=w_OI.dtype, device=a_RI.device)
    for start in range(0, w_OI.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        block = w_OI[rows].to(a_RI.device, dtype)
        result[rows] = torch.addmm(block, b_OR[rows], a_RI, alpha=factors.scaling)
    return result


def _target(plan: MergePlan, base: Path | str) -> _Target:
    folder = base_folder(base)
    config = _model_config(folder)
    if quantization := config.get("quantization_config"):
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UnsupportedAdapterError(
            f"the base is quantised ({kind}), which this version does not fold into",
            where=str(folder),
            mend="give the base as it was before it was quantised, or write an adapter (leave --into-base out)",
        )
    checkpoint = Checkpoint.open(folder)
    tied = any(table.get("tie_word_embeddings") for table in (config, *_tables(config)))
    faults, module_of = [], {}
    for module in plan.modules:
        name = base_weight_name(module.name)
        module_of[name] = module.name
        if tied and module.name.rpartition(".")[2] in {"lm_head", "embed_tokens", "wte", "embed_out", "embed_in"}:
            raise UnsupportedAdapterError(
                f"{module.name} is tied: input and output embeddings of this base are one tensor",
                where=str(folder),
                mend="train the experts without it, or write an adapter (leave --into-base out)",
            )
        if name not in checkpoint:
            faults.append(f"{name} is not in the base ({choose_from(name, checkpoint)})")
            continue
        entry = checkpoint.entry(name)
        if entry.shape != (module.out_features, module.in_features):
            faults.append(
                f"{name}: the base has {list(entry.shape)}, the experts [{module.out_features}, {module.in_features}]"
            )
        elif entry.dtype not in _FOLDABLE:
            faults.append(f"{name}: its dtype is {entry.dtype}, a soup is folded into {', '.join(sorted(_FOLDABLE))}")
    if faults:
        more = f" (and {len(faults) - _MAX_SHOWN} more)" if len(faults) > _MAX_SHOWN else ""
        raise IncompatibleExpertsError(
            "the experts do not fit the base: " + "; ".join(faults[:_MAX_SHOWN]) + more,
            where=str(folder),
            mend=f"give the base that they were trained on ({plan.base.name or 'they do not name it'})",
        )
    return _Target(folder, checkpoint, module_of)


def _check_fingerprints(experts: list[Expert], base: Path | str, fingerprint: str) -> None:
    # experts without a fingerprint name their base by a path or id that need not be this folder's: nothing to compare
    known = BaseRecord(fingerprint=fingerprint)
    strangers = [
        f"{expert.name} was trained on {expert.base.name or 'a base without a name'} ({expert.base.fingerprint[:12]})"
        for expert in experts
        if expert.base.fingerprint is not None and not is_same_base(expert.base, known)
    ]
    if strangers:
        raise IncompatibleExpertsError(
            f"this base ({fingerprint[:12]}) is not the experts': " + "; ".join(strangers),
            where=str(base),
            mend="give the base that they were trained on; if it is the same one converted, pass --same-base",
        )


def _write_shards(plan: MergePlan, bank: ExpertBank, target: _Target, scratch: Path, progress: Progress | None) -> None:
    planned = {module.name: module for module in plan.modules}
    entries = [target.checkpoint.entry(name) for name in target.checkpoint]
    total = sum(entry.end - entry.start for entry in entries)
    done = 0

    def stream(shard_file: str) -> Iterator[tuple[str, Tensor | memoryview]]:
        nonlocal done
        shard = target.checkpoint.shards[shard_file]
        for name, entry in shard.entries.items():
            if module := target.module_of.get(name):
                (soup,) = soup_factors(plan, bank, (planned[module],))
                yield name, _checked_finite(name, folded(shard.tensor(name), soup.factors), shard.tensor(name))
            else:
                yield name, shard.raw(name)
            done += entry.end - entry.start
            if progress is not None:
                progress(done, total)

    for file, shard in target.checkpoint.shards.items():
        specs = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in shard.entries.values()]
        write_safetensors(scratch / file, specs, stream(file), shard.metadata)


def _checked_finite(name: str, merged: Tensor, before: Tensor) -> Tensor:
    if not bool(torch.isfinite(merged).all()):
        damaged = not bool(torch.isfinite(before).all())
        raise InputError(
            f"{name}: the base itself holds NaN or infinity"
            if damaged
            else f"{name}: the soup has values beyond {before.dtype}",
            where=name,
            mend="give a sound base" if damaged else "take smaller weights, or a base in float32 or bfloat16",
        )
    return merged


def _copy_others(base: Path, scratch: Path) -> None:
    """Copy every file that holds no weights.

    Hidden files and folders (`.git`, `.cache`) stay behind, and so does the base's own record: it tells of the base.
    """
    for name in sorted(files_below(base)):
        relative = Path(name)
        is_weights = relative.suffix.lower() in _OTHER_WEIGHTS or (
            relative.name.endswith(".index.json") and name != INDEX
        )
        if is_weights or name in MARKERS or any(part.startswith(".") for part in relative.parts):
            continue
        if (base / relative).is_file():  # not a link to a folder or to nothing
            (scratch / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base / relative, scratch / relative)


def _model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        raise InputError(
            "the folder has no config.json: it is no model folder",
            where=str(folder),
            mend="give a folder that save_pretrained wrote",
        ) from None
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check its permissions"
        ) from error
    return config if isinstance(config, dict) else {}


def _tables(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for value in config.values() if isinstance(value, dict)]
