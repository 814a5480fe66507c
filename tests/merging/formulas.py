"""The merge methods' formulas, written a second time: float64 NumPy and loops over elements, without the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tests.merging.worlds import Part
from tests.oracles import Matrix

Parts = Sequence[Mapping[str, Part]]


def soup_of(method: str, parts: Parts, weights: Sequence[float], density: float, lambda_: float) -> dict[str, Matrix]:
    """Return the delta that a method gives each module, from each expert's deltas (`parts`)."""
    modules = sorted({module for each in parts for module in each})
    found = {}
    for module in modules:
        members = [
            (each[module], weight, index)
            for index, (each, weight) in enumerate(zip(parts, weights, strict=True))
            if module in each
        ]
        own, own_weights = [part for part, _, _ in members], [weight for _, weight, _ in members]
        if method == "ties@paper":
            least = [least_kept([part.delta for part in parts[index].values()], density) for _, _, index in members]
            kept = [cut(part.delta, bound) for part, bound in zip(own, least, strict=True)]
            found[module] = lambda_ * elected(kept, own_weights, on=own_weights, count=abs)
        elif method == "factor_average":
            a, b = total([part.a for part in own], own_weights), total([part.b for part in own], own_weights)
            found[module] = own[0].scaling / math.fsum(weights) * (b @ a)
        elif method.startswith("factor_"):
            found[module] = apart(method, own, own_weights, density)
        elif method == "knots":
            found[module] = knots([part.delta for part in own], own_weights, density, lambda_)
        else:
            found[module] = dense(method, [part.delta for part in own], own_weights, density, lambda_)
    return found


def dense(method: str, deltas: Sequence[Matrix], weights: Sequence[float], density: float, lambda_: float) -> Matrix:
    """The methods on deltas that draw no random numbers."""
    trims = [cut(delta, least_kept([delta], density, at_least=int(method == "ties@mergekit"))) for delta in deltas]
    ones = [1.0] * len(weights)
    rules: dict[str, Callable[[], Matrix]] = {
        "linear": lambda: total(deltas, weights),
        "magnitude_prune": lambda: total(trims, weights),
        "ties": lambda: lambda_ * elected(trims, weights, on=weights, count=abs),
        "ties@peft": lambda: elected(trims, weights, on=ones, count=lambda _: 1.0),
        "ties@mergekit": lambda: lambda_ * elected(trims, weights, on=weights, count=float),
    }
    return rules[method]()


def apart(method: str, parts: Sequence[Part], weights: Sequence[float], density: float) -> Matrix:
    """PEFT's rules, applied to all A's and to all B's. Each is scaled by the root of `|w s|`; A also takes the sign."""
    roots = [math.sqrt(abs(w) * part.scaling) for w, part in zip(weights, parts, strict=True)]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
    sides = []
    for tensors, own in (([part.b for part in parts], roots), ([part.a for part in parts], signed)):
        trims = [cut(tensor, least_kept([tensor], density)) for tensor in tensors]
        if method == "factor_linear":
            sides.append(total(tensors, own))
        elif method == "factor_magnitude_prune":
            sides.append(total(trims, own))
        else:
            assert method == "factor_ties"
            sides.append(elected(trims, own, on=[1.0] * len(own), count=lambda _: 1.0))
    b, a = sides
    return b @ a


def knots(deltas: Sequence[Matrix], weights: Sequence[float], density: float, lambda_: float) -> Matrix:
    """One SVD of `[d_1 ... d_E]`, TIES on `S V_e`, and back."""
    u, s, v = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    live = s > 1e-9 * s[0]
    seen = np.split((s[:, None] * v)[live], len(deltas), axis=1)
    trims = [cut(part, least_kept([part], density)) for part in seen]
    back: Matrix = u[:, live] @ elected(trims, weights, on=weights, count=abs)
    return lambda_ * back


def elected(
    parts: Sequence[Matrix], weights: Sequence[float], *, on: Sequence[float], count: Callable[[float], float]
) -> Matrix:
    """`sum_agree w t / sum_agree count(w)` where the sign of `sum on t` is elected; a sum of 0 elects +."""
    out = np.zeros_like(parts[0])
    for index in np.ndindex(out.shape):
        sign = 1 if sum(u * part[index] for u, part in zip(on, parts, strict=True)) >= 0 else -1
        agree = [e for e, part in enumerate(parts) if np.sign(on[e] * part[index]) == sign]
        divisor = sum(count(weights[e]) for e in agree)
        out[index] = sum(weights[e] * parts[e][index] for e in agree) / (divisor or 1)
    return out


def least_kept(tensors: Sequence[Matrix], density: float, at_least: int = 0) -> float:
    """The magnitude of the k-th largest entry of all tensors, `k = int(density * count)`."""
    magnitudes = sorted((abs(value) for tensor in tensors for value in tensor.ravel()), reverse=True)
    k = max(at_least, int(density * len(magnitudes)))
    return float(magnitudes[k - 1]) if k else math.inf


def cut(tensor: Matrix, least: float) -> Matrix:
    """Keep the entries of at least this magnitude."""
    return np.where(np.abs(tensor) >= least, tensor, 0.0)


def total(tensors: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """The weighted sum."""
    out = np.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        out += weight * tensor
    return out
