"""What a merged adapter holds whole beside its factors: modules, biases and rows of embeddings that experts trained.

With an expert's weight w, its value v and the base's t, a tensor is `t + sum w (v - t)`, over the experts that trained
it; likewise each row. M rows and N columns of a base's matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalized_soups.adapters.base_model import BaseModel, is_input_embedding
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.adapters.tying import are_tied_tokens
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.errors import UnsupportedAdapterError
from personalized_soups.files.writer import NAMES_OF_DTYPES, TensorSpec
from personalized_soups.merging.computing.blocks import as_matrix, folded_blocks
from personalized_soups.merging.computing.dora import is_same
from personalized_soups.merging.computing.fitting import Fitting
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.computing.terms import Toward
from personalized_soups.merging.planning.plan import MergePlan, torch_dtype

# Tensors that experts (by their positions in the bank) trained, by their targets in the base.
_ByTarget = Mapping[str, list[tuple[int, TrainedTensor]]]


@dataclass(frozen=True, eq=False, slots=True)
class WholeTensors:
    """The whole tensors of one soup, computed when they are asked for."""

    plan: MergePlan
    bank: ExpertBank
    model: BaseModel
    replaced: _ByTarget
    rows: _ByTarget

    def specs(self) -> list[TensorSpec]:
        """Return the name, dtype and shape of each."""
        dtype, layout = NAMES_OF_DTYPES[torch_dtype(self.plan.dtype)], self.plan.layout
        shapes = {layout.whole_name(target): self._base(target).shape for target in self.replaced}
        for module, rows in layout.tokens.items():
            shapes[layout.rows_name(module)] = torch.Size([len(rows), self._base(f"{module}.weight").shape[1]])
        return [TensorSpec(name, dtype, tuple(shape)) for name, shape in shapes.items()]

    def parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """Yield parts of the tensors, in order, on the CPU: the name, the first byte's place in it, elements as a row.

        Rounded once to the adapter's dtype. A part is overwritten when the next one is asked for. Memory: a block of
        rows.
        """
        dtype, layout = torch_dtype(self.plan.dtype), self.plan.layout
        for target, members in self.replaced.items():
            base_MN = as_matrix(self._base(target))
            terms = [
                Toward(self._value(index, each).reshape(base_MN.shape), self.plan.weights[index])
                for index, each in members
            ]
            row_bytes = base_MN.shape[1] * dtype.itemsize
            for block in folded_blocks(base_MN, [terms], self.bank.device, dtype):
                yield layout.whole_name(target), block.start * row_bytes, block.rows_BN.reshape(-1)
        for module, rows in layout.tokens.items():
            yield layout.rows_name(module), 0, self._rows(f"{module}.weight", rows).to(dtype).reshape(-1)

    def tensors(self) -> dict[str, Tensor]:
        """Return all of them, in memory at once."""
        found: dict[str, list[Tensor]] = {}
        for name, _, part in self.parts():
            found.setdefault(name, []).append(part.clone())
        return {spec.name: torch.cat(found[spec.name]).reshape(spec.shape) for spec in self.specs()}

    def _rows(self, target: str, rows: Sequence[int]) -> Tensor:
        """Return the rows that any expert trained, in float64."""
        base_RN = self._base(target)[list(rows)].double()
        total_RN = base_RN.clone()
        places = {row: place for place, row in enumerate(rows)}
        for index, each in self.rows[target]:
            own = torch.tensor([places[row] for row in each.rows])
            step_RN = self._value(index, each).double() - base_RN[own]
            total_RN.index_add_(0, own, step_RN, alpha=self.plan.weights[index])
        return total_RN

    def _base(self, target: str) -> Tensor:
        return self.model.checkpoint.tensor(str(self.model.source(target)))

    def _value(self, expert: int, each: TrainedTensor) -> Tensor:
        return self.bank.experts[expert].adapter.trained_tensor(each.name, None)


def on_base(plans: Sequence[MergePlan], bank: ExpertBank) -> tuple[Soups, list[WholeTensors]]:
    """Return the soups of plans over the same experts, and the whole tensors of each; none where no base is given.

    Raises:
        IncompatibleExpertsError: naming everything that is not in the base or of another shape there.
        UnsupportedAdapterError: if an embedding that an expert saved is not the base's, and DoRA is on top of it; if
            PEFT cannot hold the tokens that experts trained beside what others did.
    """
    plan = plans[0]
    if plan.base_folder is None:
        return Soups(plans, bank), []
    model = BaseModel.open(plan.base_folder)
    fitting = Fitting(bank, model)
    dora = fitting.dora(fitting.placements()) if plan.layout.use_dora else None
    found: dict[str, dict[str, list[tuple[int, TrainedTensor]]]] = {"replaced": {}, "rows": {}}
    for index, expert in enumerate(bank.experts):
        for each in expert.adapter.trained.values():
            if each.kind in found:
                fitting.check_trained(expert, each)
                found[each.kind].setdefault(each.target, []).append((index, each))
    fitting.check(plan.base.name)
    replaced = {target: each for target, each in found["replaced"].items() if not _is_bases(bank, model, each)}
    _check_under_dora(plan, bank, replaced)
    _check_rows(plan, bank, model, replaced)
    return (
        Soups(plans, bank, dora),
        [WholeTensors(each, bank, model, replaced, found["rows"]) for each in plans],
    )


def _check_rows(plan: MergePlan, bank: ExpertBank, model: BaseModel, replaced: _ByTarget) -> None:
    """Raise if PEFT would read the trained tokens of the merged adapter otherwise than those of the experts."""
    tokens = plan.layout.tokens
    what = None
    if any(f"{module}.weight" in replaced for module in tokens):
        what = "an embedding that is not the base's is saved whole, and tokens of it are trained"
    elif model.tied is not None:
        tied = {module: rows for module, rows in tokens.items() if model.source(f"{module}.weight") in model.tied}
        if tied and any(model.source(target) in model.tied for target in replaced):
            what = (
                "one expert saves an embedding whole, another trains tokens, and the base's two embeddings are one "
                "tensor"
            )
        elif not _keep_their_tokens(bank, tied):
            what = (
                "the base's two embeddings are one tensor, and the experts together train other tokens of the output "
                "embedding than of the input embedding"
            )
    if what is not None:
        raise UnsupportedAdapterError(
            f"{what}: PEFT cannot hold this in one adapter",
            where=", ".join(expert.name for expert in bank.experts),
            mend="fold the soup into the base model: into_base=BASE",
        )


def _keep_their_tokens(bank: ExpertBank, tokens: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether `tokens` of tied embeddings, by module, mean for every expert what its own tokens mean."""
    merged = _are_tied(tokens)
    for expert in bank.experts:
        trained = [each for each in expert.adapter.trained.values() if each.kind == "rows"]
        own = {module: each.rows for each in trained for module in tokens if each.target == f"{module}.weight"}
        if own and _are_tied(own) != merged:
            return False
    return True


def _are_tied(tokens: Mapping[str, tuple[int, ...]]) -> bool:
    of = {is_input_embedding(f"{module}.weight"): rows for module, rows in tokens.items()}
    return are_tied_tokens(of.get(True), of.get(False))


def _is_bases(bank: ExpertBank, model: BaseModel, members: Sequence[tuple[int, TrainedTensor]]) -> bool:
    """Return whether what was saved is the base's own: PEFT saves embeddings beside their factors."""
    if any(each.origin != "saved embedding" for _, each in members):
        return False
    base = model.checkpoint.tensor(str(model.source(members[0][1].target)))
    return all(is_same(bank.experts[index].adapter.trained_tensor(each.name, None), base) for index, each in members)


def _check_under_dora(plan: MergePlan, bank: ExpertBank, replaced: _ByTarget) -> None:
    adapted = {module.like.base_name for module in plan.modules}
    for target in replaced.keys() & adapted if plan.layout.use_dora else ():
        index, each = replaced[target][0]
        raise UnsupportedAdapterError(
            f"{each.name} is not the base's {target}: a DoRA adapter on top of it is not merged",
            where=str(bank.experts[index].folder),
            mend="fold the soup into the base model: into_base=BASE",
        )
