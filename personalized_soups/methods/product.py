"""Weighted sums of the experts' tensors for many users, computed as one matrix product.

Shapes: E = number of experts, U = number of users, P = number of elements of one expert's tensor, C = number of
elements of a block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from personalized_soups.kernels import weighted_sums as kernel

# The number of elements of each expert in one product. With six experts and sixteen users, the float32 buffers take
# 5.5 MiB, which fit into the cache of a core and the shared cache behind it.
_CHUNK = 1 << 16


class BlockSums(threading.local):
    """Computes the same sums as `weighted_sums`, block by block, in buffers that are reused.

    Each thread has its own buffers. New memory for the sums of many users would cost more time than the sums, because
    of one page fault for every 4 KiB.
    """

    def __init__(self) -> None:
        self._inward = torch.empty(0, 0)
        self._outward = torch.empty(0, 0)

    def blocks(self, weights_UE: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Yield, for each block, its start in the flattened tensors and its sums `[U, C]`. C is at most 65,536.

        The sums equal those of `weighted_sums`. The sums of the next block overwrite the sums of this block.

        Raises:
            ValueError: if there are no tensors, or if the number of weights differs from the number of tensors.
        """
        flat, weights = _checked(weights_UE, tensors)
        shapes = ((len(flat), _CHUNK), (len(weights), _CHUNK))
        if (self._inward.shape, self._outward.shape) != shapes or self._inward.dtype != weights.dtype:
            self._inward, self._outward = (weights.new_empty(shape) for shape in shapes)
        for start in range(0, flat[0].numel(), _CHUNK):
            size = min(_CHUNK, flat[0].numel() - start)
            part, sums = self._inward[:, :size], self._outward[:, :size]
            # one copy into a contiguous stack, so that the product reads each number once for all users
            torch.stack([tensor[start : start + size] for tensor in flat], out=part)
            torch.mm(weights, part, out=sums)
            yield start, sums


def weighted_sums(weights_UE: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return out_UP with `out[u] = sum_e weights[u, e] tensors[e]`. The tensors are flattened.

    Each tensor is read once for all users. On a CPU, the tensors are stacked in blocks, so the whole stack is never in
    memory. On a GPU, the tensors are stacked as a whole, so two kernel launches are enough for tensors of any size. The
    sums are computed in the dtype of the tensors, float32 or float64. Their error is at most `(E + 1) u sum |w| |x|`,
    where u is the unit roundoff of the dtype (Higham, Accuracy and Stability, section 3.1; the 1 is for the rounding of
    the weights).

    Args:
        weights_UE: the weights, on any device and in any floating-point dtype. They are converted to the dtype and the
            device of the tensors.
        tensors: E contiguous tensors of one shape, dtype and device.

    Raises:
        ValueError: if there are no tensors, or if the number of weights differs from the number of tensors.
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
        torch.stack([tensor[start:end] for tensor in flat], out=part)
        torch.mm(weights, part, out=out[:, start:end])
    return out


def sums_of_stack(weights_UE: Tensor, stack_EP: Tensor) -> Tensor:
    """Return `weights @ stack`.

    On a GPU, a kernel that reads the stack only once computes float32 products. In all other cases, torch computes the
    product. Both arguments must be contiguous, of one dtype and on one device.
    """
    out_UP = stack_EP.new_empty(weights_UE.shape[0], stack_EP.shape[1])
    # the kernel accumulates in float32, so float64 stacks need torch
    if stack_EP.dtype != torch.float32 or not kernel.weighted_sums(weights_UE, stack_EP, out_UP):
        torch.mm(weights_UE, stack_EP, out=out_UP)
    return out_UP


def _checked(weights_UE: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return the flattened tensors, and the weights in the dtype and on the device of the tensors."""
    if not tensors or weights_UE.shape[1] != len(tensors):
        raise ValueError(
            f"there are {weights_UE.shape[1]} weights for {len(tensors)} tensors; expected one weight per tensor"
        )
    flat = [tensor.reshape(-1) for tensor in tensors]
    return flat, weights_UE.to(flat[0].device, flat[0].dtype)
