"""Compute the shards of merged models from the shards of their base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from personalized_soups.errors import InputError
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.writer import TensorSpec
from personalized_soups.launching.threads import in_order, num_file_threads
from personalized_soups.merging.computing.blocks import folded_blocks
from personalized_soups.merging.computing.changes import Changes
from personalized_soups.methods.finite import all_finite


class Sink(Protocol):
    """The output for one shard of one merged model, such as a `SafetensorsWriter`. Several threads call it at once."""

    def write(self, name: str, data: Tensor | memoryview, start: int = 0) -> None:
        """Write a part of the tensor `name`. The part begins at the byte `start` of the tensor."""
        ...

    def copy(self, names: Sequence[str], source: SafetensorsFile) -> None:
        """Copy the bytes of whole tensors from the file `source`."""
        ...


def fold_shard(source: SafetensorsFile, changes: Changes, sinks: Mapping[int, Sink]) -> Iterator[int]:
    """Write the merged tensors of one shard of the base to the sink of every soup.

    Each thread computes one tensor at a time. The written bytes do not depend on the number of threads.

    Args:
        source: one shard of the base.
        changes: the changes that the soups make to the base.
        sinks: the sink of each soup, by the index of the soup in `changes.soups.plans`. A soup without a sink is not
            computed.

    Yields:
        The number of the base's bytes that each finished piece covers.

    Raises:
        InputError: if the base holds NaN or infinity, or a value of a soup does not fit into the base's dtype.
    """

    def done(names: Sequence[str]) -> int:
        if len(names) == 1 and changes.touches(names[0]):
            _fold_tensor(source, names[0], changes, sinks)
        else:
            for sink in sinks.values():
                sink.copy(names, source)
        return sum(source.entry(name).end - source.entry(name).start for name in names)

    return in_order(done, _pieces(source, changes), num_file_threads(changes.soups.bank.device))


def _fold_tensor(source: SafetensorsFile, name: str, changes: Changes, sinks: Mapping[int, Sink]) -> None:
    """Compute one tensor of the base for every soup, and write it under each of its names."""
    base = source.tensor(name)
    for written in changes.written_as(name):
        base_MN = changes.as_matrix(written, base)
        row_bytes = base_MN.shape[1] * base_MN.element_size()
        terms = changes.terms(written, base_MN)
        wanted = list(sinks)
        if not any(terms[soup] for soup in wanted):
            for soup in wanted:
                sinks[soup].write(written, source.raw(name))
            continue
        device = changes.soups.bank.device
        for block in folded_blocks(base_MN, [terms[soup] for soup in wanted], device):
            if not block.is_finite():
                _raise_not_finite(written, base_MN[block.start : block.start + block.rows_BN.shape[0]])
            sinks[wanted[block.soup]].write(written, block.rows_BN.reshape(-1), block.start * row_bytes)


def _pieces(source: SafetensorsFile, changes: Changes) -> Iterator[Sequence[str]]:
    """Yield lists of tensor names in the file's order. A changed tensor is alone in its list.

    Unchanged tensors that follow each other are in one list, so that their bytes are copied together.
    """
    stretch: list[str] = []
    for name in source.entries:
        if not changes.touches(name):
            stretch.append(name)
            continue
        if stretch:
            yield stretch
            stretch = []
        yield [name]
    if stretch:
        yield stretch


def _raise_not_finite(name: str, before: Tensor) -> None:
    """Raise the error for a block with NaN or infinity. The block `before` of the base shows where they come from."""
    damaged = not all_finite(before)
    raise InputError(
        f"{name}: the base holds NaN or infinity"
        if damaged
        else f"{name}: the soup has values beyond the range of {before.dtype}",
        where=name,
        mend="give an undamaged copy of the base model"
        if damaged
        else "use smaller weights, or a base model in float32 or bfloat16",
    )


def shard_specs(source: SafetensorsFile, changes: Changes) -> list[TensorSpec]:
    """Return the name, dtype and shape of each tensor that the merged shard of `source` holds, in the file's order."""
    return [
        TensorSpec(name, entry.dtype, entry.shape)
        for entry in source.entries.values()
        for name in changes.written_as(entry.name)
    ]
