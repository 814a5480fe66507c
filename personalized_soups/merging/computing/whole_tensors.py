"""The tensors of a merged adapter that experts trained whole: saved modules, biases and rows of embeddings.

Let t be a tensor of the base, and v the value of an expert with the weight w. The soup's tensor is `t + sum w (v - t)`,
summed over the experts that trained the tensor. The same holds for each row of an embedding.

Shapes: M and N = rows and columns of the base's matrix, R = number of trained rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.embeddings import is_input_embedding
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.adapters.tying import are_tied_tokens
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.devices import torch_dtype
from personalized_soups.errors import UnsupportedAdapterError
from personalized_soups.files.writer import NAMES_OF_DTYPES, TensorSpec
from personalized_soups.merging.computing.blocks import as_matrix, folded_blocks
from personalized_soups.merging.computing.dora import is_same
from personalized_soups.merging.computing.fitting import Fitting
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.computing.terms import Toward
from personalized_soups.merging.planning.plan import MergePlan

# By the name of a tensor of the base: the experts' tensors that change it, each with the expert's position in the bank.
_ByTarget = Mapping[str, list[tuple[int, TrainedTensor]]]


@dataclass(frozen=True, eq=False, slots=True)
class WholeTensors:
    """The tensors of one soup that experts trained whole. The tensors are computed only when they are read.

    Attributes:
        plan: the plan of the merge.
        bank: the experts.
        model: the base.
        replaced: the experts' tensors that replace a tensor of the base, by the name of the base's tensor.
        rows: the experts' trained rows of embeddings, by the name of the base's embedding.
    """

    plan: MergePlan
    bank: ExpertBank
    model: BaseModel
    replaced: _ByTarget
    rows: _ByTarget

    def specs(self) -> list[TensorSpec]:
        """Return the name, dtype and shape of each tensor, in the order of the file."""
        # a safetensors file begins with all shapes, so they are needed before any tensor is computed
        dtype, layout = NAMES_OF_DTYPES[torch_dtype(self.plan.dtype)], self.plan.layout
        shapes = {layout.whole_name(target): self._base(target).shape for target in self.replaced}
        for module, rows in layout.tokens.items():
            shapes[layout.rows_name(module)] = torch.Size([len(rows), self._base(f"{module}.weight").shape[1]])
        return [TensorSpec(name, dtype, tuple(shape)) for name, shape in shapes.items()]

    def parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """Compute the tensors part by part, in the order of the file. Only one block of rows is in memory at once.

        Yields:
            For each part: the tensor's name, the index of the part's first byte in the tensor, and the part's elements.
            The elements are a vector on the CPU, rounded once to the adapter's dtype. The next part overwrites them.
        """
        dtype, layout = torch_dtype(self.plan.dtype), self.plan.layout
        for target, members in self.replaced.items():
            base_MN = as_matrix(self._base(target))
            terms = [
                Toward(self._value(index, tensor).reshape(base_MN.shape), self.plan.weights[index])
                for index, tensor in members
            ]
            # the size of a row in bytes in the adapter's dtype, which may differ from the base's dtype
            row_bytes = base_MN.shape[1] * dtype.itemsize
            for block in folded_blocks(base_MN, [terms], self.bank.device, dtype):
                yield layout.whole_name(target), block.start * row_bytes, block.rows_BN.reshape(-1)
        for module, rows in layout.tokens.items():
            yield layout.rows_name(module), 0, self._rows(f"{module}.weight", rows).to(dtype).reshape(-1)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name. All are in memory at once."""
        parts: dict[str, list[Tensor]] = {}
        for name, _, part in self.parts():
            # cloned, since the next part overwrites it
            parts.setdefault(name, []).append(part.clone())
        return {spec.name: torch.cat(parts[spec.name]).reshape(spec.shape) for spec in self.specs()}

    def _rows(self, target: str, rows: Sequence[int]) -> Tensor:
        """Return the soup's values in float64 of `rows`, the rows of the embedding `target` that any expert trained."""
        base_RN = self._base(target)[list(rows)].double()
        # the differences are relative to the base, so the sum must not overwrite the base's rows
        total_RN = base_RN.clone()
        # experts may have trained different tokens, so each expert's rows are found in the union of all rows
        places = {row: place for place, row in enumerate(rows)}
        for index, tensor in self.rows[target]:
            own = torch.tensor([places[row] for row in tensor.rows])
            step_RN = self._value(index, tensor).double() - base_RN[own]
            total_RN.index_add_(0, own, step_RN, alpha=self.plan.weights[index])
        return total_RN

    def _base(self, target: str) -> Tensor:
        return self.model.checkpoint.tensor(str(self.model.source(target)))

    def _value(self, expert: int, tensor: TrainedTensor) -> Tensor:
        return self.bank.experts[expert].adapter.trained_tensor(tensor.name, None)


def on_base(plans: Sequence[MergePlan], bank: ExpertBank) -> tuple[Soups, list[WholeTensors]]:
    """Return the soups of plans with the same experts, and for each soup the tensors that experts trained whole.

    If the plans have no base, the second list is empty.

    Raises:
        IncompatibleExpertsError: if the base lacks a tensor that the experts change, or has it in another shape or
            dtype. The message names the first of these tensors.
        UnsupportedAdapterError: if an expert saved a changed tensor and also has DoRA magnitudes for it. Also if PEFT
            could not load the experts' trained tokens together with their other tensors as one adapter.
    """
    plan = plans[0]
    if plan.base_folder is None:
        return Soups(plans, bank), []
    model = BaseModel.open(plan.base_folder)
    fitting = Fitting(bank, model)
    # only DoRA needs the modules' places in the base: an adapter's factors do not depend on the base
    dora = fitting.dora(fitting.placements()) if plan.layout.use_dora else None
    trained: dict[str, dict[str, list[tuple[int, TrainedTensor]]]] = {"replaced": {}, "rows": {}}
    for index, expert in enumerate(bank.experts):
        for tensor in expert.adapter.trained.values():
            if tensor.kind in trained:
                fitting.check_trained(expert, tensor)
                trained[tensor.kind].setdefault(tensor.target, []).append((index, tensor))
    fitting.check(plan.base.name)
    # a saved tensor that equals the base's tensor changes nothing and would only enlarge the adapter
    replaced = {name: members for name, members in trained["replaced"].items() if not _is_bases(bank, model, members)}
    _check_under_dora(plan, bank, replaced)
    _check_rows(plan, bank, model, replaced)
    return (
        Soups(plans, bank, dora),
        [WholeTensors(plan, bank, model, replaced, trained["rows"]) for plan in plans],
    )


def _check_rows(plan: MergePlan, bank: ExpertBank, model: BaseModel, replaced: _ByTarget) -> None:
    """Raise an error if PEFT would not apply the trained tokens of the merged adapter as it applies the experts'."""
    tokens = plan.layout.tokens
    what = None
    # the soup sums both changes, but PEFT would overwrite the embedding's rows with the trained tokens
    if any(f"{module}.weight" in replaced for module in tokens):
        what = "one expert saves a changed embedding whole, but rows of the same embedding are also trained as tokens"
    elif model.tied is not None:
        # PEFT compares the token numbers of both embeddings to decide whether their trained rows are tied
        tied = {module: rows for module, rows in tokens.items() if model.source(f"{module}.weight") in model.tied}
        if tied and any(model.source(target) in model.tied for target in replaced):
            what = (
                "one expert saves an embedding whole, another trains tokens, and the base stores its input and output "
                "embeddings as one tensor"
            )
        elif not _keep_their_tokens(bank, tied):
            what = (
                "the base stores its input and output embeddings as one tensor, but the experts together train "
                "different tokens in the two embeddings"
            )
    if what is not None:
        raise UnsupportedAdapterError(
            f"{what}, so PEFT could not load the merged adapter",
            where=", ".join(expert.name for expert in bank.experts),
            mend="fold the soup into the base model: into_base=BASE",
        )


def _keep_their_tokens(bank: ExpertBank, tokens: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether PEFT ties the trained rows of the merged adapter if and only if it ties those of each expert."""
    merged = _are_tied(tokens)
    for expert in bank.experts:
        trained = [tensor for tensor in expert.adapter.trained.values() if tensor.kind == "rows"]
        own = {module: tensor.rows for tensor in trained for module in tokens if tensor.target == f"{module}.weight"}
        if own and _are_tied(own) != merged:
            return False
    return True


def _are_tied(tokens: Mapping[str, tuple[int, ...]]) -> bool:
    by_side = {is_input_embedding(f"{module}.weight"): rows for module, rows in tokens.items()}
    return are_tied_tokens(by_side.get(True), by_side.get(False))


def _is_bases(bank: ExpertBank, model: BaseModel, members: Sequence[tuple[int, TrainedTensor]]) -> bool:
    """Return whether all saved tensors in `members` are embeddings that equal the base's embedding.

    PEFT saves an embedding together with the factors that adapt it, even if the embedding did not change.
    """
    # modules_to_save are trained, so only saved embeddings are compared
    if any(tensor.origin != "saved embedding" for _, tensor in members):
        return False
    base = model.checkpoint.tensor(str(model.source(members[0][1].target)))
    return all(
        is_same(bank.experts[index].adapter.trained_tensor(tensor.name, None), base) for index, tensor in members
    )


def _check_under_dora(plan: MergePlan, bank: ExpertBank, replaced: _ByTarget) -> None:
    """Raise an error if the merged adapter would have DoRA magnitudes for a tensor that an expert saved whole."""
    adapted = {module.like.base_name for module in plan.modules}
    # the merge computes the norms of W + B A with the base's W, but PEFT would compute them with the saved tensor
    for target in replaced.keys() & adapted if plan.layout.use_dora else ():
        index, tensor = replaced[target][0]
        raise UnsupportedAdapterError(
            f"the expert's saved tensor {tensor.name} differs from the base's tensor {target}, and an expert with both "
            "this tensor and DoRA magnitudes cannot be merged into an adapter",
            where=str(bank.experts[index].folder),
            mend="fold the soup into the base model: into_base=BASE",
        )
