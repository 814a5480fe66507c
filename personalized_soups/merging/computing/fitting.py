"""Check from the files' headers whether the experts fit a base model, and collect all tensors that do not fit."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.adapters.base_model import BaseModel
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.placement import Placement, place
from personalized_soups.adapters.trained import TrainedTensor
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.errors import IncompatibleExpertsError
from personalized_soups.merging.computing.dora import Dora

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MAX_SHOWN = 5


class Fitting:
    """Finds the tensors of a base model that the experts of a bank change.

    Mismatches are collected, and `check` raises one error for all of them.

    Args:
        bank: the experts.
        model: the base model.
        sources: the experts and the base adapter, if the soup includes one. The default is the experts of the bank.
    """

    def __init__(self, bank: ExpertBank, model: BaseModel, sources: Sequence[Expert] | None = None) -> None:
        self._bank = bank
        self._sources = bank.experts if sources is None else sources
        self._model = model
        self._faults: list[str] = []
        self._targets: dict[str, str] = {}
        self._lacks_names = False

    def placements(self) -> dict[str, Placement]:
        """Return the placement of each module in a tensor of the base, by the module's name.

        A module that the base lacks, or whose placement is not unique, is left out and collected as a mismatch.
        """
        experts = self._sources
        every = {name: module for expert in experts for name, module in expert.adapter.modules.items()}
        shapes = {}
        for module in every.values():
            if (shape := self._shape(module.base_name)) is not None:
                shapes[module.base_name] = shape
        placements: dict[str, Placement] = {}
        for expert in experts:
            own = expert.adapter.modules
            # all experts have the same base, so one expert's modules can decide placements that another's leave open
            known = [module for module in {**every, **own}.values() if module.base_name in shapes]
            placed, faults = place(known, shapes)
            self._faults.extend(faults)
            for name in placed.keys() & own.keys():
                if placements.setdefault(name, placed[name]) != placed[name]:
                    self._faults.append(f"the experts' files imply different placements of {name} in its tensor")
        return placements

    def dora(self, placements: dict[str, Placement]) -> Dora:
        """Return the experts' magnitudes with the tensors of the base to which they belong."""
        sources = ((name, self._model.source(each.base_name), each) for name, each in placements.items())
        places = {name: (source, placement) for name, source, placement in sources if source is not None}
        return Dora(self._bank, self._model.checkpoint, places)

    def check_trained(self, expert: Expert, tensor: TrainedTensor) -> None:
        """Collect a mismatch if a tensor that an expert trained whole does not fit the base."""
        target, shape = tensor.target, self._shape(tensor.target)
        if shape is None:
            return
        # trained rows are only some rows of an embedding, so only the width must match
        fits = shape[1:] == tensor.shape[1:] if tensor.kind == "rows" else shape == tensor.shape
        if not fits:
            self._faults.append(
                f"{target} has shape {list(shape)} in the base, but shape {list(tensor.shape)} in {expert.name}"
            )
        elif tensor.kind == "rows" and tensor.rows and max(tensor.rows) >= shape[0]:
            last = max(tensor.rows)
            self._faults.append(f"{target} has {shape[0]} rows in the base, but {expert.name} trained row {last}")

    def check(self, base_name: str | None) -> None:
        """Raise one error for all collected mismatches.

        Args:
            base_name: the base's name in the experts' files; None if the files do not name the base.

        Raises:
            IncompatibleExpertsError: if the base lacks a tensor that the experts change, or has it in another shape or
                dtype. The message names the first of these tensors.
        """
        # several experts can cause the same mismatch, which is reported once
        faults = list(dict.fromkeys(self._faults))
        if faults:
            more = f" (and {len(faults) - _MAX_SHOWN} more)" if len(faults) > _MAX_SHOWN else ""
            raise IncompatibleExpertsError(
                "the experts do not fit the base: " + "; ".join(faults[:_MAX_SHOWN]) + more,
                where=str(self._model.folder),
                mend=f"give the base that the experts were trained on ({base_name or 'their files do not name it'})"
                + ("; if this is that base, save it again with the model class of the training" * self._lacks_names),
            )

    def _check_alone(self, target: str) -> None:
        """Collect a mismatch if two names in the experts lead to the same tensor of the base.

        The experts were then trained on another base.
        """
        stored = self._model.find(target)
        # a stored name may lack a prefix of the model class, so several names can be found under one
        first = target if stored is None else self._targets.setdefault(stored, target)
        if first != target:
            self._faults.append(f"{first} and {target} are two tensors in the experts, but one in the base: {stored}")

    def _shape(self, target: str) -> tuple[int, ...] | None:
        """Return the shape of the base's tensor `target`. If the base lacks it, collect a mismatch and return None."""
        source = self._model.source(target)
        if source is None:
            self._faults.append(f"{target} is not in the base ({self._model.names.why_not(target)})")
            self._lacks_names = True
            return None
        self._check_alone(target)
        entry = self._model.checkpoint.entry(source)
        if entry.dtype not in _FLOATS:
            allowed = ", ".join(sorted(_FLOATS))
            self._faults.append(f"{target} has dtype {entry.dtype} in the base, but it must be one of {allowed}")
        return entry.shape
