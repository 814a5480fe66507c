"""Where a module's delta `scaling * B @ A` is added in the base: which tensor, which rows, and whether transposed.

Every tensor of the base is viewed as a matrix. A delta consists of parts, and each part is added to a range of whole
rows of this matrix, as in PEFT's merge:

| kind | base tensor | as a matrix | parts |
|---|---|---|---|
| linear | [O, I] | [O, I] | B A |
| transposed (GPT-2's Conv1D) | [I, O] | [I, O] | A^T B^T |
| embedding | [V, D] | [V, D] | A^T B^T, A [R, V] |
| conv | [O, I, k, ...] | [O, I k ...] | B A |
| parameter (of E experts) | [E, O, I] or [E, I, O] | [E O, I] or [E I, O] | for each e: B_e A_e, or its transpose |

Source: get_delta_weight of the classes in peft.tuners.lora.layer (0.21.2).

Shapes: R = rank, I = in_features, O = out_features, k = kernel size, V = vocabulary size, D = size of an embedding,
E = number of experts of a mixture, M = rows and N = columns of a part of the base's matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalized_soups.adapters.modules import LoraModule
from personalized_soups.methods.factors import Factors

# The names of the Conv1D layers in transformers (GPT, GPT-2, ImageGPT, DecisionTransformer, CLVP).
_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a delta: `scaling * left_MR @ right_RN` is added to M rows of the base's matrix.

    Attributes:
        start: the index of the first of these rows.
        left_MR: a view of one factor.
        right_RN: a view of the other factor.
    """

    start: int
    left_MR: Tensor  # noqa: N815
    right_RN: Tensor  # noqa: N815


@dataclass(frozen=True, slots=True)
class Placement:
    """The tensor of the base to which a module's delta is added, and how that tensor is viewed as a matrix.

    Attributes:
        base_name: the tensor's name.
        matrix_shape: the shape of the matrix. The matrix is a view of the tensor, not a copy.
        is_transposed: whether the tensor is stored as [in, out] instead of [out, in].
        blocks: the number of matrices in a parameter of a mixture of experts, else 1.
    """

    base_name: str
    matrix_shape: tuple[int, int]
    is_transposed: bool
    blocks: int = 1

    @property
    def output_axis(self) -> int:
        """The axis of the matrix that corresponds to the module's outputs. Not defined for the kind `parameter`."""
        return 1 if self.is_transposed else 0

    def parts(self, factors: Factors) -> tuple[Part, ...]:
        """Return the parts of a delta, sorted by their first row.

        The tensors of the parts are views of the factors, not copies.

        Raises:
            ValueError: if the shapes of the factors do not fit the shape of the matrix.
        """
        height = self.matrix_shape[0] // self.blocks
        parts = []
        for block, each in enumerate(blocks_of(factors, self.blocks)):
            left, right = (each.a_RI.T, each.b_OR.T) if self.is_transposed else (each.b_OR, each.a_RI)
            if (left.shape[0], right.shape[1]) != (height, self.matrix_shape[1]):
                raise ValueError(
                    f"B of shape {list(factors.b_OR.shape)} and A of shape {list(factors.a_RI.shape)} do not fit a "
                    f"matrix of shape {list(self.matrix_shape)}"
                )
            parts.append(Part(block * height, left, right))
        return tuple(parts)


def place(modules: Iterable[LoraModule], shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Placement], list[str]]:
    """Return the placement of each module in a base, by the module's name, and a list of messages.

    Each message says why one module has no placement.

    An adapter does not say reliably which layers are Conv1D (stored as [I, O] instead of [O, I]): PEFT saves a single
    fan_in_fan_out, which is that of the layer that it wrapped last. An adapter also does not say how a mixture's
    parameter is stored. So the shapes of the base's tensors decide. A square tensor is stored like the other layers of
    the same name or, if there are none, like all other layers, or as fan_in_fan_out says. If these contradict each
    other, the module has no placement.

    Args:
        modules: all modules of one adapter, because other modules decide how square tensors are stored.
        shapes: the shapes of the base's tensors, by name.
    """
    faults: list[str] = []
    fitting: dict[str, tuple[LoraModule, bool | None]] = {}
    certain: dict[tuple[str, str], set[bool]] = {}
    for module in modules:
        if module.base_name not in shapes:
            faults.append(f"{module.base_name} is not in the base{_kept_apart(module, shapes)}")
            continue
        try:
            turned = _orientation(module, tuple(shapes[module.base_name]))
        except ValueError as error:
            faults.append(str(error))
            continue
        fitting[module.name] = (module, turned)
        if turned is not None and _may_turn(module):
            certain.setdefault((_family(module), _leaf(module)), set()).add(turned)
    found = {}
    for name, (module, turned) in fitting.items():
        settled = _settled(module, certain) if turned is None else turned
        if settled is None:
            faults.append(
                f"{module.base_name} is square, and it is unknown whether it is stored as [out, in] or [in, out]"
            )
        else:
            matrix_shape = _matrix_shape(module, shapes[module.base_name])
            found[name] = Placement(module.base_name, matrix_shape, settled, module.blocks)
    return found, faults


def blocks_of(factors: Factors, blocks: int) -> tuple[Factors, ...]:
    """Return the factors of each block of a module, as views of the module's factors.

    In PEFT's layout, the rows of A are grouped by block, and the columns of B are interleaved.

    Raises:
        ValueError: if the rank is not a multiple of `blocks`.
    """
    if blocks == 1:
        return (factors,)
    rank, rest = divmod(factors.rank, blocks)
    if rest:
        raise ValueError(f"the rank {factors.rank} is not a multiple of the number of blocks {blocks}")
    a_parts = factors.a_RI.split(rank)
    return tuple(Factors(a_RI, factors.b_OR[:, block::blocks], factors.scaling) for block, a_RI in enumerate(a_parts))


def of_blocks(blocks: Sequence[Factors]) -> Factors:
    """Join the factors of a module's blocks in PEFT's layout; see `blocks_of`.

    The factors are new tensors. If there is only one block, its own factors are returned.

    Raises:
        ValueError: if not all blocks have the same rank and scaling.
    """
    if len(blocks) == 1:
        return blocks[0]
    if len({(each.rank, each.scaling) for each in blocks}) > 1:
        raise ValueError("the blocks have different ranks or scalings")
    a_RI = torch.cat([each.a_RI for each in blocks])
    b_OR = torch.stack([each.b_OR for each in blocks], dim=2).flatten(1)
    return Factors(a_RI, b_OR, blocks[0].scaling)


def add_parts(rows_MN: Tensor, parts: Iterable[Part], scaling: float = 1.0, start: int = 0) -> None:
    """Add `scaling * left_MR @ right_RN` of every part to a range of rows of a base's matrix, in place.

    Args:
        rows_MN: the range of rows, which is changed in place. The sum is computed in its dtype.
        parts: the parts of one module's delta, with the dtype and device of `rows_MN`. Rows of parts outside the range
            are skipped.
        scaling: the factor of the products.
        start: the index in the whole matrix of the first row of `rows_MN`.
    """
    stop = start + rows_MN.shape[0]
    for part in parts:
        first, last = max(part.start, start), min(part.start + part.left_MR.shape[0], stop)
        if first < last:
            left_MR = part.left_MR[first - part.start : last - part.start]
            rows_MN[first - start : last - start].addmm_(left_MR, part.right_RN, alpha=scaling)


def squared_norms(rows_MN: Tensor, output_axis: int) -> Tensor:
    """Return the squared L2 norm of each output in a range of rows of a base's matrix, in float64.

    If `output_axis` is 0, each row is one output. If it is 1, each column is one output, and the result covers only the
    given rows: add the results of all ranges of rows to get the squared norms of the outputs.
    """
    norms: Tensor = torch.linalg.vector_norm(rows_MN, dim=1 - output_axis, dtype=torch.float64)
    return norms.square_()


def scale_outputs(rows_MN: Tensor, scale_O: Tensor, output_axis: int) -> None:
    """Multiply each output in a range of rows of a base's matrix by its scale, in place.

    For DoRA, the scale of an output is its magnitude divided by its norm.

    Source: arXiv 2402.09353. In peft.tuners.lora.variants, DoraLinearVariant, DoraEmbeddingVariant and
    _DoraConvNdVariant have the same formula, with the norm over all inputs (and the kernel) of an output.
    """
    rows_MN.mul_(scale_O.to(rows_MN.dtype).unsqueeze(1 - output_axis))


def _kept_apart(module: LoraModule, shapes: Mapping[str, Sequence[int]]) -> str:
    """Return a note if the base has one tensor per expert of a mixture instead of one parameter, else an empty text."""
    first = f"{module.base_name.rpartition('.')[0]}.0."
    if module.blocks > 1 and any(name.startswith(first) for name in shapes):
        return f" (the base has one tensor per expert of the mixture, {first}*, which this version does not support)"
    return ""


def _orientation(module: LoraModule, shape: tuple[int, ...]) -> bool | None:
    """Return whether a tensor of this shape stores the module's weight transposed, or None if both are possible.

    Raises:
        ValueError: if the shape fits the module in neither way.
    """
    fitting = [index for index, each in enumerate(module.base_shapes) if each == shape]
    if not fitting:
        expected = " or ".join(str(list(each)) for each in dict.fromkeys(module.base_shapes))
        raise ValueError(f"{module.base_name}: the base has shape {list(shape)}, but the adapter is for {expected}")
    if not _may_turn(module):
        return module.kind == "embedding"
    return None if len(fitting) == 2 else fitting == [1]


def _settled(module: LoraModule, certain: Mapping[tuple[str, str], set[bool]]) -> bool | None:
    """Return whether the base stores the weight of a square module transposed, or None if that is unknown."""
    family, leaf = _family(module), _leaf(module)
    own = certain.get((family, leaf), set())
    all_seen = set().union(*(seen for (kin, _), seen in certain.items() if kin == family))
    if own or family == "parameter":
        seen = own or all_seen
        return next(iter(seen)) if len(seen) == 1 else None
    configured = module.kind == "transposed"
    return None if all_seen - {configured} or (leaf in _CONV1D_NAMES and not configured) else configured


def _may_turn(module: LoraModule) -> bool:
    return module.kind in {"linear", "transposed"} or module.blocks > 1


def _matrix_shape(module: LoraModule, shape: Sequence[int]) -> tuple[int, int]:
    rows = math.prod(shape[:-1]) if module.kind == "parameter" else shape[0]
    return rows, math.prod(shape) // rows


def _family(module: LoraModule) -> str:
    return "parameter" if module.kind == "parameter" else "linear"


def _leaf(module: LoraModule) -> str:
    return module.name.rpartition(".")[2]
