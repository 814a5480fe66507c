"""Compute the weighted sums of the experts' parameters on a GPU, for one or many users. The experts are read once.

Shapes: E = number of experts, U = number of users, P = number of values of one expert.
"""

from __future__ import annotations

from torch import Tensor

from personalized_soups.kernels import launching

# A thread keeps its sums in registers. If each thread needs few registers, many threads can run at once, which hides
# the latency of memory. Each of 128 threads reads 4 or 8 values at once and uses them for up to 8 users.
_TILE = 4096
_LEAST_VALUES = 512
_MOST_VALUES = 1024
_MOST_USERS = 8


def weighted_sums(weights_UE: Tensor, experts_EP: Tensor, out_UP: Tensor) -> bool:
    """Write `out[u] = sum_e weights[u, e] * experts[e]` with a kernel, and return whether the kernel was launched.

    The sums are computed in float32 in the order of the experts and rounded once to the dtype of `out`. If the result
    is False, `out` is unchanged.

    Args:
        weights_UE: the weights of each user, contiguous, in float32 and on the device of the experts.
        experts_EP: the values of each expert in float32, float16 or bfloat16. Each row must be contiguous.
        out_UP: the output in float32, float16 or bfloat16, on the same device. Each row must be contiguous.
    """
    return launching.is_usable(experts_EP) and launching.launched(
        lambda: launch(weights_UE, experts_EP, out_UP), experts_EP
    )


def weighted_sum(weights_E: Tensor, experts_EP: Tensor, out_P: Tensor) -> bool:
    """Write the weighted sum for one user with a kernel, and return whether the kernel was launched.

    See `weighted_sums`.
    """
    return launching.is_usable(experts_EP) and weighted_sums(weights_E[None], experts_EP, out_P[None])


def launch(weights_UE: Tensor, experts_EP: Tensor, out_UP: Tensor) -> None:
    """Launch the kernel with the arguments of `weighted_sums`."""
    from personalized_soups.kernels.source import weighted_sums_kernel

    (num_users, num_values), num_experts = out_UP.shape, experts_EP.shape[0]
    if num_users * num_values == 0:
        return
    users = min(_MOST_USERS, 1 << (num_users - 1).bit_length())
    values = max(_LEAST_VALUES, min(_MOST_VALUES, _TILE // users))
    weighted_sums_kernel[(-(-num_values // values) * -(-num_users // users),)](
        out_UP, experts_EP, weights_UE,
        num_values, num_users, num_experts, out_UP.stride(0), experts_EP.stride(0), weights_UE.stride(0),
        USERS=users, VALUES=values, **launching.OPTIONS,
    )  # fmt: skip
