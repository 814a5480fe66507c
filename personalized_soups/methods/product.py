"""Many users at once: the weighted sums of E tensors for U users are one matrix product.

E experts, U users, P numbers of one expert.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from personalized_soups.kernels import weighted_sums as kernel

# Numbers of each expert that are multiplied at once: with six experts and sixteen users 5 MiB, near enough to a core.
_CHUNK = 1 << 16


class BlockSums(threading.local):
    """The sums of weighted_sums, block by block in buffers that are used again; each thread has buffers of its own.

    Fresh memory for the sums of many users costs more than the sums: a page fault for every 4 KiB.
    """

    def __init__(self) -> None:
        self._inward = torch.empty(0, 0)
        self._outward = torch.empty(0, 0)

    def blocks(self, weights_UE: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield where a block begins in a flattened tensor, and the sums there, `[U, C]` of at most 65,536 numbers.

        The same numbers as weighted_sums. A block is overwritten when the next one is asked for.

        Raises:
            ValueError: as weighted_sums.
        """
        flat, weights = _checked(weights_UE, tensors)
        shapes = ((len(flat), _CHUNK), (len(weights), _CHUNK))
        if (self._inward.shape, self._outward.shape) != shapes or self._inward.dtype != weights.dtype:
            self._inward, self._outward = (weights.new_empty(shape) for shape in shapes)
        for start in range(0, flat[0].numel(), _CHUNK):
            size = min(_CHUNK, flat[0].numel() - start)
            part, sums = self._inward[:, :size], self._outward[:, :size]
            torch.stack([each[start : start + size] for each in flat], out=part)
            torch.mm(weights, part, out=sums)
            yield start, sums


def weighted_sums(weights_UE: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return `out[u] = sum_e weights[u, e] tensors[e]`, every tensor flattened.

    Each tensor is read once, whatever the number of users is. On a CPU a stack of them is never formed whole; on a GPU
    it is, so that tensors of any size take two launches. The sums are taken in the tensors' own dtype, float32 or
    float64: `|err| <= (E + 1) u sum |w| |x|` with its unit roundoff u (Higham, Accuracy and Stability, section 3.1; one
    more for the rounded weight).

    Args:
        weights_UE: on any device and in any floating dtype; rounded to the tensors'.
        tensors: E tensors of one shape, dtype and device, each contiguous.

    Raises:
        ValueError: if there are no tensors, or not as many as weights.
    """
    flat, weights = _checked(weights_UE, tensors)
    if flat[0].device.type != "cpu":
        return sums_of_stack(weights, torch.stack(flat))
    size = flat[0].numel()
    out = flat[0].new_empty(weights.shape[0], size)
    chunk = flat[0].new_empty(len(flat), min(_CHUNK, size))
    for start in range(0, size, _CHUNK):
        end = min(start + _CHUNK, size)
        part = chunk[:, : end - start]
        torch.stack([each[start:end] for each in flat], out=part)
        torch.mm(weights, part, out=out[:, start:end])
    return out


def sums_of_stack(weights_UE: Tensor, stack_EP: Tensor) -> Tensor:
    """Return `weights @ stack`: on a GPU by a kernel that writes the sums as it reads the stack, else by torch.

    Both in one dtype and on one device, contiguous.
    """
    out_UP = stack_EP.new_empty(weights_UE.shape[0], stack_EP.shape[1])
    # the kernel adds up in float32
    if stack_EP.dtype != torch.float32 or not kernel.weighted_sums(weights_UE, stack_EP, out_UP):
        torch.mm(weights_UE, stack_EP, out=out_UP)
    return out_UP


def _checked(weights_UE: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the tensors flattened, and the weights in their dtype and on their device."""
    if not tensors or weights_UE.shape[1] != len(tensors):
        raise ValueError(f"{weights_UE.shape[1]} weights for {len(tensors)} tensors")
    flat = [tensor.reshape(-1) for tensor in tensors]
    return flat, weights_UE.to(flat[0].device, flat[0].dtype)
