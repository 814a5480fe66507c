"""The products that set a live soup. A product combines the experts' fixed tensors with a profile's coefficients.

Shapes: E = number of experts, K = rank of the live adapter, O = sum of out_features of all modules, P = number of
elements of all A's (or all B's) of one expert.
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
    """A product of the experts' fixed tensors and a profile's coefficients, both in float32.

    Attributes:
        live: the buffer that receives the product. Its address never changes.
    """

    live: Tensor

    @property
    def widths(self) -> tuple[int, ...]:
        """For each expert, how many times the coefficients of `run` contain the expert's coefficient."""

    @property
    def num_bytes(self) -> int:
        """The number of bytes of all tensors of the product."""

    def run(self, coefficients: Tensor) -> None:
        """Compute the product in float32 and write it into `live`. It is rounded once to the dtype of `live`.

        Args:
            coefficients: float32 on the device of `live`. The coefficient of each expert is repeated as often as
                `widths` says.
        """

    def bound(self, coefficients: Sequence[float]) -> float:
        """Return an upper bound of the magnitudes in the product. `coefficients` has one number per expert."""


class RowSum:
    """The product `live_P = sum_e c_e experts_EP`, with one coefficient c_e per expert.

    On a GPU, a kernel computes the sum. On other devices, a matrix-vector product computes it. A matrix-matrix product
    could be computed in TF32 or bfloat16, if the user has lowered torch's float32 matmul precision.
    """

    def __init__(self, experts_EP: Tensor, dtype: torch.dtype) -> None:
        num_experts, num_values = experts_EP.shape
        self.live = experts_EP.new_zeros(num_values, dtype=dtype)
        self.widths = (1,) * num_experts
        self._experts_EP = experts_EP
        self._experts_PE = experts_EP.T
        # BLAS needs one dtype for the matrix, the coefficients and the result, so a 16-bit soup is first summed in
        # float32
        has_scratch = dtype != torch.float32 and not experts_EP.is_cuda
        self._sum_P = torch.zeros_like(self.live, dtype=torch.float32) if has_scratch else None
        self._peaks: list[float] = torch.linalg.vector_norm(experts_EP, math.inf, dim=1).tolist()

    @property
    def num_bytes(self) -> int:
        """The number of bytes of all tensors of the product."""
        return total_bytes(self._experts_EP, self.live, *([] if self._sum_P is None else [self._sum_P]))

    def run(self, coefficients: Tensor) -> None:
        """Compute the product and write it into `live`."""
        if weighted_sum(coefficients, self._experts_EP, self.live):
            return
        sum_P = self.live if self.live.dtype == torch.float32 else self._sum_P
        if sum_P is None:
            # on a GPU without the kernel, torch's caching allocator returns the same memory each time
            sum_P = torch.empty_like(self.live, dtype=torch.float32)
        # not torch.mv: before torch 2.11, it allocates the whole result even if `out` is given
        torch.addmv(sum_P, self._experts_PE, coefficients, beta=0, out=sum_P)
        if sum_P is not self.live:
            self.live.copy_(sum_P)

    def bound(self, coefficients: Sequence[float]) -> float:
        """Return the sum of the largest magnitudes of the experts' weighted rows, an upper bound for the product."""
        return math.fsum(abs(c) * peak for c, peak in zip(coefficients, self._peaks, strict=True))


class ColumnScale:
    """The elementwise product `live_OK = pristine_OK * columns_K`.

    `columns_K` repeats the coefficient of each expert once for each column of the expert.
    """

    def __init__(self, pristine_OK: Tensor, ranks: Sequence[int], dtype: torch.dtype) -> None:
        self.live = torch.zeros_like(pristine_OK, dtype=dtype)
        self.widths = tuple(ranks)
        self._pristine_OK = pristine_OK
        # On CUDA, the kernel rounds to the dtype of the output. On the CPU, torch would allocate a buffer every time.
        direct = dtype == torch.float32 or pristine_OK.is_cuda
        self._scaled_OK = self.live if direct else torch.zeros_like(pristine_OK)
        peaks = torch.linalg.vector_norm(pristine_OK, math.inf, dim=0)
        self._peaks: list[float] = [part.max().item() for part in peaks.split(self.widths)]

    @property
    def num_bytes(self) -> int:
        """The number of bytes of all tensors of the product."""
        return total_bytes(self._pristine_OK, self.live, self._scaled_OK)

    def run(self, coefficients: Tensor) -> None:
        """Compute the product and write it into `live`."""
        if scale_columns(self._pristine_OK, coefficients, self.live):
            return
        torch.mul(self._pristine_OK, coefficients, out=self._scaled_OK)
        if self._scaled_OK is not self.live:
            self.live.copy_(self._scaled_OK)

    def bound(self, coefficients: Sequence[float]) -> float:
        """Return the largest magnitude in the product."""
        return max(abs(c) * peak for c, peak in zip(coefficients, self._peaks, strict=True))


def total_bytes(*tensors: Tensor) -> int:
    """Return the total number of bytes of the tensors. Tensors at the same address count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
