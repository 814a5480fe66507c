"""The changes that soups make to a base model.

The files' headers show which tensors change. The change of each tensor is then computed as a list of terms.

Shapes: O = out_features, M and N = rows and columns of the base's matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.embeddings import is_input_embedding
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.placement import Placement
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.adapters.tying import are_tied_tokens, tied_copies
from personalized_soups.errors import UnsupportedAdapterError
from personalized_soups.merging.computing.blocks import arithmetic_dtype, as_matrix
from personalized_soups.merging.computing.dora import Dora
from personalized_soups.merging.computing.fitting import Fitting
from personalized_soups.merging.computing.module_soups import ModuleSoup, Soups
from personalized_soups.merging.computing.terms import Dense, Product, Rescale, Term, Toward, TowardRows
from personalized_soups.merging.planning.plan import PlannedModule


@dataclass(frozen=True, eq=False, slots=True)
class Change:
    """The modules and tensors of the experts that change one tensor of the base.

    Attributes:
        modules: the modules that adapt the tensor, each with its placement in the tensor.
        trained: the tensors that experts trained whole, each with the expert's position in the bank. DoRA magnitudes
            are not in this list, because they belong to their modules.
    """

    modules: list[tuple[PlannedModule, Placement]] = field(default_factory=list)
    trained: list[tuple[int, TrainedTensor]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Changes:
    """The changes that soups of the same experts make to a base.

    Attributes:
        soups: the soups.
        model: the base.
        changes: the change of each changed tensor, by the tensor's name in the written model.
        unties: the name of the output embedding if the base has one tensor for both embeddings, but the soups change
            the two embeddings differently; else None.
    """

    soups: Soups
    model: BaseModel
    changes: Mapping[str, Change]
    unties: str | None

    @classmethod
    def of(cls, soups: Soups, model: BaseModel) -> Self:
        """Find the tensors of the base that the experts change.

        Raises:
            IncompatibleExpertsError: if the base lacks such a tensor or has it in another shape or dtype. The message
                names the first of these tensors.
            UnsupportedAdapterError: if an expert changes an embedding in a way that this version cannot fold.
        """
        search = _Search(soups, model)
        search.run()
        with_dora = soups if search.dora is None else replace(soups, dora=search.dora)
        return cls(with_dora, model, search.changes, search.unties)

    def written_as(self, tensor: str) -> tuple[str, ...]:
        """Return the names under which a tensor of the base is written. An embedding that is untied may have two."""
        tied = self.model.tied
        # a base may store both tied names; then the output embedding is written in its own place
        if self.unties is None or tied is None or tensor != tied[0] or self.unties in self.model.checkpoint:
            return (tensor,)
        return (tensor, self.unties)

    def touches(self, tensor: str) -> bool:
        """Return whether a tensor of the base changes or is written under two names."""
        return tensor in self.changes or len(self.written_as(tensor)) > 1

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        """Return the matrix to which the terms of the written tensor `name` are added, as a view of `tensor`."""
        change = self.changes.get(name)
        if change is not None and change.modules:
            # the placement knows the matrix of tensors with more than two axes; all modules of a tensor agree on it
            return tensor.reshape(change.modules[0][1].matrix_shape)
        return as_matrix(tensor)

    def terms(self, name: str, base_MN: Tensor) -> list[list[Term]]:
        """Return the terms of each soup for one tensor.

        Args:
            name: the name of the written tensor.
            base_MN: the base's tensor as a matrix, from `as_matrix`.
        """
        kind = arithmetic_dtype(base_MN.dtype)
        terms: list[list[Term]] = [[] for _ in self.soups.plans]
        for module, placement in self.changes.get(name, Change()).modules:
            for soup_terms, soup in zip(terms, self.soups.of(module), strict=True):
                soup_terms.extend(_placed(soup, placement, kind))
        for soup_terms, trained in zip(terms, self.trained_terms(name, base_MN), strict=True):
            soup_terms.extend(trained)
        return terms

    def trained_terms(self, name: str, base_MN: Tensor) -> list[list[Term]]:
        """Return the terms of each soup that come from tensors that experts trained whole. Arguments as in `terms`."""
        device = self.soups.bank.device
        terms: list[list[Term]] = [[] for _ in self.soups.plans]
        trained = self.changes.get(name, Change()).trained
        for expert, tensor in trained:
            value = self.soups.bank.experts[expert].adapter.trained_tensor(tensor.name, None)
            # PEFT applies trained tokens after saved embeddings, regardless of their order in the file
            rows = [row for owner, part in trained if owner == expert and part.kind == "rows" for row in part.rows]
            if tensor.kind == "replaced" and rows:
                value = _without_rows(value, rows, base_MN)
            for soup_terms, plan in zip(terms, self.soups.plans, strict=True):
                soup_terms.append(_whole(tensor, value, base_MN, plan.weights[expert], device))
        return terms


class _Search:
    """Finds the tensors of the written model that the experts change, and checks that the experts fit the base."""

    def __init__(self, soups: Soups, model: BaseModel) -> None:
        self.soups = soups
        self.model = model
        self.changes: dict[str, Change] = {}
        self.dora: Dora | None = None
        # the base adapter comes last, so that the positions of the experts are those of the bank
        self._experts = soups.sources
        self._fitting = Fitting(soups.bank, model, soups.sources)
        self._copies = [tied_copies(expert.adapter) if model.tied else {} for expert in self._experts]
        self._rows = [self._rows_of(expert) for expert in self._experts]
        # if tied embeddings are untied, the output embedding becomes the new tensor
        self.unties = model.tied[1] if model.tied is not None and self._needs_two() else None

    def run(self) -> None:
        """Fill `changes` and `dora`, and raise an error if the experts do not fit the base."""
        self._check_output_for_both()
        placements = self._fitting.placements()
        dora = self._fitting.dora(placements)
        # if no expert has magnitudes, the base's tensors need not be read for their norms
        self.dora = dora if dora.magnitudes else None
        for module in self.soups.plan.modules:
            if (placement := placements.get(module.name)) is not None:
                for name in self._written(module.like.base_name):
                    self._change(name).modules.append((module, placement))
        for index, expert in enumerate(self._experts):
            for each in expert.adapter.trained.values():
                # a copy under the second name of tied embeddings would add the same change twice
                if each.kind != "magnitude" and (each.name not in self._copies[index] or self.unties is not None):
                    self._add_trained(index, expert, each)
        self._fitting.check(self.soups.plan.base.name)

    def _needs_two(self) -> bool:
        """Return whether the base's embeddings are tied, but the soups change one differently from the other."""
        # an expert's trained tokens change only one of the two embeddings
        if any(len(names) == 1 for targets in self._rows for names in targets.values()):
            return True
        for expert, copies in zip(self._experts, self._copies, strict=True):
            modules = expert.adapter.modules.values()
            whole = [tensor for tensor in expert.adapter.trained.values() if tensor.kind == "replaced"]
            changed = [(module.name, module.base_name) for module in modules]
            changed += [(tensor.name, tensor.target) for tensor in whole]
            of_tied = {name for name, target in changed if self._is_tied(target)}
            # PEFT saves a change of both embeddings twice, under both names; such pairs keep the embeddings tied
            repeated = {name for copy, original in copies.items() for name in (copy, original)}
            if of_tied - repeated:
                return True
        return False

    def _rows_of(self, expert: Expert) -> dict[str, tuple[str, ...]]:
        """Return the names of the tied embeddings that each tensor of trained tokens changes, by the tensor's name.

        The result is empty if the base's embeddings are not tied.
        """
        tied = self.model.tied
        rows = [each for each in expert.adapter.trained.values() if each.kind == "rows" and self._is_tied(each.target)]
        if tied is None or not rows:
            return {}
        tokens = {is_input_embedding(each.target): each.rows for each in rows}
        # PEFT trains one set of rows for both embeddings if the token numbers agree
        names = (tied, ()) if are_tied_tokens(tokens.get(True), tokens.get(False)) else (tied[:1], tied[1:])
        return {each.name: names[0] if is_input_embedding(each.target) else names[1] for each in rows}

    def _check_output_for_both(self) -> None:
        """Raise an error if an expert changes an output embedding that transformers also loads as the input embedding.

        A change that is folded into this output embedding would change both embeddings.
        """
        head = self.model.output_for_both
        for expert in self._experts if head is not None else ():
            targets = [module.base_name for module in expert.adapter.modules.values()]
            targets += [tensor.target for tensor in expert.adapter.trained.values()]
            if any(self.model.find(target) == head for target in targets):
                raise UnsupportedAdapterError(
                    f"the expert {expert.name} changes {head}, which is also the base's input embedding; this version "
                    "changes a tensor of both embeddings only if the base's files store it as the input embedding",
                    where=str(self.model.folder),
                    mend="save the base again: AutoModelForCausalLM.from_pretrained(BASE).save_pretrained(NEW)",
                )

    def _is_tied(self, target: str) -> bool:
        return self.model.tied is not None and self.model.written_name(target) in self.model.tied

    def _written(self, target: str) -> tuple[str, ...]:
        """Return the names of the written tensors that a change of `target` changes.

        If `target` is an embedding that stays tied, these are the names of both embeddings that the files contain.
        """
        if self._is_tied(target) and self.unties is None and self.model.tied is not None:
            # the change under the first name covers both names, and under the second name it would be added again
            is_copy = self.model.written_name(target) == self.model.tied[1]
            return () if is_copy else tuple(name for name in self.model.tied if name in self.model.checkpoint)
        return (self.model.written_name(target),)

    def _change(self, name: str) -> Change:
        return self.changes.setdefault(name, Change())

    def _add_trained(self, index: int, expert: Expert, each: TrainedTensor) -> None:
        """Add a tensor that an expert trained whole to the changes of every written tensor that it changes."""
        self._fitting.check_trained(expert, each)
        names = self._rows[index].get(each.name) if each.kind == "rows" else None
        if names is None:
            names = self._written(each.target)
        elif self.unties is None:
            # a base with tied embeddings may store only one of the two names
            names = tuple(name for name in names if name in self.model.checkpoint)
        for name in names:
            self._change(name).trained.append((index, each))


def _placed(soup: ModuleSoup, placement: Placement, kind: torch.dtype) -> list[Term]:
    """Return the terms of one module's soup for the base's tensor, in the dtype `kind`."""
    if soup.delta_OI is not None:
        # a Conv1D stores its weight as [I, O] (transformers/pytorch_utils.py)
        delta = soup.delta_OI.mT if placement.is_transposed else soup.delta_OI
        return [Dense(delta.to(kind).reshape(placement.matrix_shape))]
    assert soup.factors is not None
    terms: list[Term] = [
        Product(part.left_MR.to(kind), part.right_RN.to(kind), part.start) for part in placement.parts(soup.factors)
    ]
    if soup.scale_O is not None:
        # the scale stays in float64 until Rescale has subtracted 1
        terms.append(Rescale(soup.scale_O.to(soup.factors.a_RI.device), placement.output_axis))
    return terms


def _without_rows(value: Tensor, rows: list[int], base_MN: Tensor) -> Tensor:
    """Return a copy of an expert's saved embedding with the base's values in `rows`, the rows of trained tokens.

    PEFT overwrites these rows of the embedding with the trained tokens, so the saved embedding must not change them.
    """
    # in a narrower dtype the base's rows would be rounded, and the rounding would count as a change
    kept = value.to(torch.promote_types(value.dtype, base_MN.dtype), copy=True)
    kept[rows] = base_MN[rows].to(kept.dtype)
    return kept


def _whole(tensor: TrainedTensor, value: Tensor, base_MN: Tensor, weight: float, device: torch.device) -> Term:
    """Return the term of a tensor that an expert trained whole, given the tensor's value in the expert's file."""
    if tensor.kind == "rows":
        return TowardRows(torch.tensor(tensor.rows), value, weight)
    value_MN = value.reshape(base_MN.shape)
    if tensor.kind == "added":
        # a lora_bias is scaled like B (peft/tuners/lora/layer.py)
        return Dense(value_MN.to(device, arithmetic_dtype(base_MN.dtype)) * (weight * tensor.scaling))
    return Toward(value_MN, weight)
