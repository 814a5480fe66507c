"""Call a merge method that is defined outside this package, and check the method's result.

Shapes: R = rank, I = in_features, O = out_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.finite import all_finite
from personalized_soups.methods.method import Method


def merged_delta(
    method: Method, name: str, deltas: Sequence[Tensor], weights: Sequence[float], **keywords: Any
) -> Tensor:
    """Call a method of the family `dense` for the module `name`, and return the delta_OI of the soup.

    Raises:
        UsageError: if the method does not return a finite tensor with the shape, dtype and device of the deltas.
    """
    like_OI = deltas[0]
    shape, dtype, device = like_OI.shape, like_OI.dtype, like_OI.device
    delta_OI = _call(method, name, list(deltas), list(weights), keywords)
    if not isinstance(delta_OI, Tensor) or (delta_OI.shape, delta_OI.dtype, delta_OI.device) != (shape, dtype, device):
        raise _wrong(method, name, _described(delta_OI), f"a tensor {list(shape)} of {dtype} on {device}")
    if not all_finite(delta_OI):
        raise _wrong(method, name, "NaN or infinity", "finite values")
    return delta_OI


def merged_factors(
    method: Method, name: str, factors: Sequence[Factors], weights: Sequence[float], rank: int, **keywords: Any
) -> Factors:
    """Call a method of the family `factor` for the module `name`, and return the factors of the soup.

    Raises:
        UsageError: if the method does not return finite `Factors` with the module's shape, the dtype and device of the
            experts' factors, the scaling 1, and a rank of at most `rank`.
    """
    a_RI, b_OR = factors[0].a_RI, factors[0].b_OR
    expected = (b_OR.shape[0], a_RI.shape[1], a_RI.dtype, a_RI.device)
    result = _call(method, name, list(factors), list(weights), keywords)
    if not isinstance(result, Factors):
        raise _wrong(method, name, _described(result), "Factors")
    a_RI, b_OR = result.a_RI, result.b_OR
    for part in (a_RI, b_OR):
        if (b_OR.shape[0], a_RI.shape[1], part.dtype, part.device) != expected:
            out_features, in_features, dtype, device = expected
            raise _wrong(
                method,
                name,
                f"B {_described(b_OR)} and A {_described(a_RI)}",
                f"B [{out_features}, R] and A [R, {in_features}] of {dtype} on {device}",
            )
        if not all_finite(part):
            raise _wrong(method, name, "NaN or infinity", "finite values")
    if result.rank > rank or result.scaling != 1:
        raise _wrong(
            method, name, f"rank {result.rank} and scaling {result.scaling:g}", f"at most rank {rank} and scaling 1"
        )
    return result


def _call(method: Method, name: str, parts: Sequence[Any], weights: Sequence[float], keywords: dict[str, Any]) -> Any:
    try:
        return method.load()(parts, weights, **keywords)
    except Exception as error:
        # the method's author needs the traceback, so the exception is raised again with a note
        error.add_note(f"the merge method {method.name!r} raised this error for {name}")
        raise


def _described(result: object) -> str:
    if isinstance(result, Tensor):
        return f"{list(result.shape)} of {result.dtype} on {result.device}"
    return f"an object of type {type(result).__name__}"


def _wrong(method: Method, name: str, found: str, expected: str) -> UsageError:
    return UsageError(
        f"{name}: the merge method {method.name!r} returned {found}, but it must return {expected}",
        where="method",
        mend="correct the method's function as described in docs/howto/add_a_method.md",
    )
