"""The products that set a live soup: fixed numbers of the experts times a profile's coefficients.

E experts, K rank of the live adapter, O out features, P numbers in all A's (or all B's) of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from personalized_soups.kernels.scale_columns import scale_columns
from personalized_soups.kernels.weighted_sums import weighted_sum


class Product(Protocol):
    """The product of the experts' fixed numbers and a profile's coefficients, both float32.

    Attributes:
        live: the buffer that receives the product. Its address never changes.
    """

    live: Tensor

    @property
    def widths(self) -> tuple[int, ...]:
        """How many times `run` takes each expert's coefficient."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the product."""

    def run(self, coefficients: Tensor) -> None:
        """Compute the product in float32, and write it into `live`, rounded once to `live`'s dtype.

        Args:
            coefficients: float32 on the device of `live`: each expert's coefficient, repeated as `widths` says.
        """

    def bound(self, coefficients: Sequence[float]) -> float:
        """Return an upper bound of the magnitudes in the product, from one coefficient per expert."""


class RowSum:
    """`live_P = sum_e c_e experts_EP`, with one coefficient per expert.

    A kernel computes the sum on a GPU, and a matrix-vector product elsewhere. A matrix-matrix product would be computed
    in TF32 or bfloat16 if the user has lowered torch's float32 matmul precision.
    """

    def __init__(self, experts_EP: Tensor, dtype: torch.dtype) -> None:
        num_experts, num_values = experts_EP.shape
        self.live = experts_EP.new_zeros(num_values, dtype=dtype)
        self.widths = (1,) * num_experts
        self._experts_EP = experts_EP
        self._experts_PE = experts_EP.T
        # BLAS needs one dtype for matrix, coefficients and result, so a 16-bit soup is first summed in float32
        has_scratch = dtype != torch.float32 and not experts_EP.is_cuda
        self._sum_P = torch.zeros_like(self.live, dtype=torch.float32) if has_scratch else None
        self._peaks: list[float] = torch.linalg.vector_norm(experts_EP, math.inf, dim=1).tolist()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the product."""
        return total_bytes(self._experts_EP, self.live, *([] if self._sum_P is None else [self._sum_P]))

    def run(self, coefficients: Tensor) -> None:
        """Write the product into `live`."""
        if weighted_sum(coefficients, self._experts_EP, self.live):
            return
        sum_P = self.live if self.live.dtype == torch.float32 else self._sum_P
        if sum_P is None:
            # a GPU without the kernel: torch's caching allocator returns the same memory again
            sum_P = torch.empty_like(self.live, dtype=torch.float32)
        # not torch.mv: before torch 2.11, it allocates the whole result even if `out` is given
        torch.addmv(sum_P, self._experts_PE, coefficients, beta=0, out=sum_P)
        if sum_P is not self.live:
            self.live.copy_(sum_P)

    def bound(self, coefficients: Sequence[float]) -> float:
        """Return the sum of the experts' largest magnitudes, an upper bound of those in the product."""
        return math.fsum(abs(c) * peak for c, peak in zip(coefficients, self._peaks, strict=True))


class ColumnScale:
    """`live_OK = pristine_OK * columns_K`, elementwise. Each expert's coefficient scales the columns of its rank."""

    def __init__(self, pristine_OK: Tensor, ranks: Sequence[int], dtype: torch.dtype) -> None:
        self.live = torch.zeros_like(pristine_OK, dtype=dtype)
        self.widths = tuple(ranks)
        self._pristine_OK = pristine_OK
        # CUDA rounds to the output's dtype inside the kernel; on the CPU, torch would allocate this buffer every time
        direct = dtype == torch.float32 or pristine_OK.is_cuda
        self._scaled_OK = self.live if direct else torch.zeros_like(pristine_OK)
        peaks = torch.linalg.vector_norm(pristine_OK, math.inf, dim=0)
        self._peaks: list[float] = [part.max().item() for part in peaks.split(self.widths)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the product."""
        return total_bytes(self._pristine_OK, self.live, self._scaled_OK)

    def run(self, coefficients: Tensor) -> None:
        """Write the product into `live`."""
        if scale_columns(self._pristine_OK, coefficients, self.live):
            return
        torch.mul(self._pristine_OK, coefficients, out=self._scaled_OK)
        if self._scaled_OK is not self.live:
            self.live.copy_(self._scaled_OK)

    def bound(self, coefficients: Sequence[float]) -> float:
        """Return the largest magnitude in the product."""
        return max(abs(c) * peak for c, peak in zip(coefficients, self._peaks, strict=True))


def total_bytes(*tensors: Tensor) -> int:
    """Return the bytes of tensors. Tensors at the same address count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
