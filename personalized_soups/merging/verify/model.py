"""Compare the tensors of a merged model with recomputed tensors.

The changes of the soup are added to the base again, as in a merge, but the result is compared with the merged model
instead of being written.

Shapes: B = rows of a block, M and N = rows and columns of a base matrix, R = rank.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from personalized_soups.files.header import BITS, TORCH_DTYPES
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.writer import TensorSpec
from personalized_soups.launching.threads import num_file_threads
from personalized_soups.merging.computing.blocks import arithmetic_dtype
from personalized_soups.merging.computing.changes import Changes
from personalized_soups.merging.computing.terms import Dense, Product, Rescale, Term, Toward, TowardRows
from personalized_soups.merging.verify.adapter import same_bytes
from personalized_soups.merging.verify.verification import Comparison, Difference, Distance, Fault
from personalized_soups.merging.writing.model_shards import fold_shard, shard_specs

# The number of bytes of a copied tensor that are compared at a time.
_CHUNK_BYTES = 4 << 20


def compare_model(folder: Path, changes: Changes, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """Merge the experts into the base again, and compare the result with the shards in `folder`.

    Only a few blocks of rows are in memory at a time.

    Raises:
        FileFormatError: if a shard in `folder` is damaged.
        InputError: if the base or an expert contains NaN or infinity.
    """
    shards = changes.model.checkpoint.shards
    total = sum(source.num_bytes - source.header_bytes for source in shards.values())
    done = num_tensors = 0
    differences: list[Difference] = []
    faults: list[Fault] = []
    for file, source in shards.items():
        specs = shard_specs(source, changes)
        num_tensors += len(specs)
        if not (folder / file).is_file():
            continue  # file_faults reports missing files
        written = SafetensorsFile.open(folder / file)
        faults += _misfits(file, specs, source, written)
        sink = _ComparingSink(changes, written, specs)
        for num_bytes in fold_shard(source, changes, {0: sink}):
            done += num_bytes
            if progress is not None:
                progress(done, total)
        differences += sink.differences()
    return Comparison(num_tensors, tuple(differences), tuple(faults))


def _misfits(
    file: str, specs: Iterable[TensorSpec], source: SafetensorsFile, written: SafetensorsFile
) -> Iterable[Fault]:
    expected = {spec.name: spec for spec in specs}
    for name, spec in expected.items():
        entry = written.entries.get(name)
        if entry is None:
            yield Fault("tensor", name, f"is missing from {file}")
        elif (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            what = f"has dtype {entry.dtype} and shape {list(entry.shape)}, expected {spec.dtype} {list(spec.shape)}"
            yield Fault("tensor", name, what)
    for name in sorted(set(written.entries) - set(expected)):
        yield Fault("tensor", name, f"does not belong to {file}")
    if dict(written.metadata) != dict(source.metadata):
        what = f"has the header metadata {dict(written.metadata)}, expected {dict(source.metadata)}"
        yield Fault("configuration", file, what)


class _ComparingSink:
    """A sink for `fold_shard` that compares each tensor with the tensor in a written shard.

    Several threads may call it at the same time.
    """

    def __init__(self, changes: Changes, written: SafetensorsFile, specs: Iterable[TensorSpec]) -> None:
        self._changes = changes
        self._written = written
        self._specs = {
            spec.name: spec
            for spec in specs
            if (entry := written.entries.get(spec.name)) and (entry.dtype, entry.shape) == (spec.dtype, spec.shape)
        }
        self._distances: dict[str, Distance] = {}
        self._lock = threading.Lock()
        self._magnitudes = lru_cache(maxsize=num_file_threads(changes.soups.bank.device))(self._magnitudes_of)

    def differences(self) -> list[Difference]:
        """Return the differences of all tensors that differ, in the order of the file."""
        distances = ((name, self._distances.get(name)) for name in self._specs)
        return [distance.result(name) for name, distance in distances if distance is not None and not distance.is_equal]

    def write(self, name: str, data: Tensor | memoryview, start: int = 0) -> None:
        """Compare a part of the tensor `name`. The part begins at byte `start` of the tensor."""
        if name not in self._specs:
            return
        if isinstance(data, memoryview):
            self._compare_copy(name, data)
            return
        distance = self._distance(name)
        written_MN = self._changes.as_matrix(name, self._written.tensor(name))
        width = max(written_MN.shape[1], 1)
        first = start // (width * written_MN.element_size())
        block_BN = data.reshape(-1, width)
        written_BN = written_MN[first : first + block_BN.shape[0]]
        if same_bytes(written_BN, block_BN):
            distance.add_equal(block_BN)
            return
        # The allowed distance costs as much as the merge. It is not needed after a larger distance.
        room_BN = self._room(name, block_BN, first) if distance.may_be_rounding else None
        distance.add(written_BN, block_BN, room_BN)

    def copy(self, names: Sequence[str], source: SafetensorsFile) -> None:
        """Compare whole tensors with the same tensors of the base."""
        for name in names:
            if name in self._specs:
                self._compare_copy(name, source.raw(name))

    def _distance(self, name: str) -> Distance:
        with self._lock:
            return self._distances.setdefault(name, Distance())

    def _compare_copy(self, name: str, expected: memoryview) -> None:
        """Compare a tensor that the merge copies from the base. Its bytes must be equal."""
        written, kind = self._written.raw(name), self._specs[name].dtype
        starts = range(0, len(expected), _CHUNK_BYTES)
        if all(torch.equal(_chunk(written, start), _chunk(expected, start)) for start in starts):
            return
        distance = self._distance(name)
        for start in starts:
            distance.add(_numbers(_chunk(written, start), kind), _numbers(_chunk(expected, start), kind), None)

    def _room(self, name: str, block_BN: Tensor, first: int) -> Tensor:
        """Return how far two computations of a block may differ, in float64 on the CPU.

        Each computation has an error of at most `ulp / 2 + (K + 2) u (|W| + sum |w s| |B| |A|)` per element. W is the
        base matrix, w and s are the weight and the scaling of an expert, u is the unit roundoff of the arithmetic, and
        K is the number of products in the sum of one element.
        """
        terms, depth = self._magnitudes(name)
        base_MN = self._base_MN(name)
        kind, device = arithmetic_dtype(block_BN.dtype), self._changes.soups.bank.device
        base_BN = base_MN[first : first + block_BN.shape[0]].to(device, kind).abs()
        size_BN = base_BN.clone()
        for term in terms:
            # applied to -|base|, a term `weight * (value - base)` of magnitudes adds a sum of magnitudes
            term.add(size_BN, -base_BN, first)
        numbers, unit = torch.finfo(block_BN.dtype), torch.finfo(kind).eps / 2
        # use the ulp of the rounded value: rounding up may reach the next power of two, where the ulp is twice as large
        size_BN = torch.maximum(size_BN.cpu().double(), block_BN.double().abs())
        return size_BN * (numbers.eps + 2 * (depth + 2) * unit) + numbers.smallest_normal * numbers.eps

    def _magnitudes_of(self, name: str) -> tuple[list[Term], int]:
        terms = self._changes.terms(name, self._base_MN(name))[0]
        return [magnitude_of(term) for term in terms], _depth(terms)

    def _base_MN(self, name: str) -> Tensor:  # noqa: N802
        model = self._changes.model
        # the base has no tensor for an untied output embedding, which is computed from the input embedding
        source = name if name in model.checkpoint or model.tied is None else model.tied[0]
        return self._changes.as_matrix(name, model.checkpoint.tensor(source))


def magnitude_of(term: Term) -> Term:
    """Return a term that bounds the magnitudes of `term`.

    If the term is applied to -|base|, it adds at least the magnitude of every number that `term` adds.
    """
    if isinstance(term, Product):
        return replace(term, left_MR=term.left_MR.abs(), right_RN=term.right_RN.abs())
    if isinstance(term, Dense):
        return replace(term, delta_MN=term.delta_MN.abs())
    if isinstance(term, Toward):
        return replace(term, value_MN=term.value_MN.abs(), weight=abs(term.weight))
    if isinstance(term, TowardRows):
        return replace(term, value_RN=term.value_RN.abs(), weight=abs(term.weight))
    assert isinstance(term, Rescale)
    return replace(term, scale=1 - (term.scale - 1).abs())


def _depth(terms: Iterable[Term]) -> int:
    """Return the largest number of products in the sum of one element.

    Products with different first rows change different rows. So only products with the same first row are added up.
    """
    ranks: Counter[int] = Counter()
    others = 0
    for term in terms:
        if isinstance(term, Product):
            ranks[term.first] += term.right_RN.shape[0]
        else:
            others += 1
    return others + max(ranks.values(), default=0)


def _chunk(data: memoryview, start: int) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)[start : start + _CHUNK_BYTES]


def _numbers(data: Tensor, kind: str) -> Tensor:
    """Return bytes as numbers of the dtype `kind`.

    If torch cannot compute with this dtype, return the bytes unchanged.
    """
    dtype = TORCH_DTYPES.get(kind)
    if dtype is None or dtype.is_complex or BITS[kind] < 8:
        return data
    # cloned, because the first byte of a chunk may not be aligned for the dtype
    return data.clone().view(dtype)
