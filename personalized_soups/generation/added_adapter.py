"""Add a base adapter's delta to the weights of a loaded model, so that the model is base + adapter in every layer.

The sums are those of a merge into a base's files: `W + (s B) A` in float32, rounded once to the model's dtype. So a
float32 model has, bit for bit, the weights of the base into which the adapter was merged on a CPU.

Shapes: M and N = rows and columns of a weight's matrix, B = rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.adapters.placement import Placement, place
from personalized_soups.errors import IncompatibleExpertsError, UnsupportedAdapterError, UsageError
from personalized_soups.merging.computing.blocks import arithmetic_dtype, folded_blocks
from personalized_soups.merging.computing.terms import Product
from personalized_soups.methods.linear import linear

_MAX_SHOWN = 5
_CPU = torch.device("cpu")


def add_adapter(model: Any, on: BaseAdapter) -> None:
    """Add `s B A` of every module of the adapter to the model's weights, in place. Nothing changes if a check fails.

    The sums are computed on the CPU and copied to the weights' device.

    Args:
        model: a model of transformers, whose modules have the names that the adapter uses.
        on: the adapter.

    Raises:
        IncompatibleExpertsError: if the model lacks a module of the adapter, or has it in another shape.
        UnsupportedAdapterError: if a weight is quantised or offloaded, or belongs to the input and the output embedding
            at once.
        InputError: if a value of the adapter is NaN or infinite. The weights before it have changed then.
        UsageError: if a sum does not fit into the model's dtype. The weights before it have changed then.
    """
    placements = _placements(model, on)
    for name, placement in placements.items():
        weight = model.get_parameter(placement.base_name).data
        for start, rows_BN in _sums(weight, placement, on, name):
            if not bool(torch.isfinite(rows_BN).all()):
                raise UsageError(
                    f"base and adapter together have values in {placement.base_name} that do not fit into "
                    f"{str(weight.dtype).removeprefix('torch.')}",
                    where=str(on.folder),
                    mend="load the model with dtype=float32 or dtype=bfloat16",
                )
            weight.view(placement.matrix_shape)[start : start + len(rows_BN)].copy_(rows_BN)


def _sums(weight: Tensor, placement: Placement, on: BaseAdapter, name: str) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the rows of each block of the weight's matrix with the module's delta added."""
    kind = arithmetic_dtype(weight.dtype)
    # `linear` multiplies the scaling into B as a merge does: in float64, rounded once
    factors = linear([on.adapter.factors(name)], [1.0])
    terms = [Product(part.left_MR.to(kind), part.right_RN.to(kind), part.start) for part in placement.parts(factors)]
    # the blocks read the weight's old values, so a block may be overwritten once it is computed
    for block in folded_blocks(weight.to(_CPU).view(placement.matrix_shape), [terms], _CPU):
        yield block.start, block.rows_BN


def _placements(model: Any, on: BaseAdapter) -> dict[str, Placement]:
    modules = on.adapter.modules.values()
    found: dict[str, Tensor] = {}
    for module in modules:
        try:
            found[module.base_name] = model.get_parameter(module.base_name)
        except AttributeError:
            continue
    for name, weight in found.items():
        _check_dense(name, weight, on)
    _check_untied(model, found, on)
    placements, faults = place(modules, {name: tuple(weight.shape) for name, weight in found.items()})
    if faults:
        more = f" (and {len(faults) - _MAX_SHOWN} more)" if len(faults) > _MAX_SHOWN else ""
        raise IncompatibleExpertsError(
            "the adapter does not fit the base: " + "; ".join(faults[:_MAX_SHOWN]) + more,
            where=str(on.folder),
            mend="give the base that the adapter was trained on",
        )
    return placements


def _check_dense(name: str, weight: Tensor, on: BaseAdapter) -> None:
    if weight.is_meta:
        raise UnsupportedAdapterError(
            f"{name} is offloaded, so the adapter cannot be added to it",
            where=str(on.folder),
            mend="load the model on a device that holds all of it, or merge the adapter into the base first "
            "(into_base=BASE)",
        )
    # 8-bit floats are quantised, too: their scales are stored elsewhere
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        raise UnsupportedAdapterError(
            f"{name} is quantised, so the adapter cannot be added to it",
            where=str(on.folder),
            mend="merge the adapter into the unquantised base first, and load the merged "
            "model with quantization_config",
        )


def _check_untied(model: Any, found: dict[str, Tensor], on: BaseAdapter) -> None:
    """Raise an error if a weight is the input and the output embedding at once. PEFT changes only one of the two."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(layer, "weight", None) for layer in layers]
    if weights[0] is not weights[1] or weights[0] is None:
        return
    for name, weight in found.items():
        if weight is weights[0]:
            raise UnsupportedAdapterError(
                f"the adapter changes {name}, which is the input and the output embedding at once, but the adapter "
                "changes only one of the two",
                where=str(on.folder),
                mend="merge the adapter into the base first, which separates the two "
                "embeddings, and give the merged model as the base",
            )
