"""Where what experts adapt and train stands in a base: found from headers, every fault of the fit told at once."""

from __future__ import annotations

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
    """Places the experts of a bank in a base model, and collects what does not fit until `check` is called."""

    def __init__(self, bank: ExpertBank, model: BaseModel) -> None:
        self._bank = bank
        self._model = model
        self._faults: list[str] = []
        self._targets: dict[str, str] = {}
        self._lacks_names = False

    def placements(self) -> dict[str, Placement]:
        """Return where each module stands, without those that stand nowhere or in doubt."""
        experts = self._bank.experts
        every = {name: module for expert in experts for name, module in expert.adapter.modules.items()}
        shapes = {}
        for module in every.values():
            if (shape := self._shape(module.base_name)) is not None:
                shapes[module.base_name] = shape
        found: dict[str, Placement] = {}
        for expert in experts:
            own = expert.adapter.modules
            # what one expert's layers leave in doubt another's may show, since all have one base
            known = [module for module in {**every, **own}.values() if module.base_name in shapes]
            placed, faults = place(known, shapes)
            self._faults.extend(faults)
            for name in placed.keys() & own.keys():
                if found.setdefault(name, placed[name]) != placed[name]:
                    self._faults.append(f"{name}: the experts do not agree on how it stands in the base")
        return found

    def dora(self, placements: dict[str, Placement]) -> Dora:
        """Return what experts with magnitudes need of the base."""
        sources = ((name, self._model.source(each.base_name), each) for name, each in placements.items())
        places = {name: (source, each) for name, source, each in sources if source is not None}
        return Dora(self._bank, self._model.checkpoint, places)

    def check_trained(self, expert: Expert, each: TrainedTensor) -> None:
        """Note what is wrong with a tensor that an expert trained whole, if anything."""
        shape = self._shape(each.target)
        if shape is None:
            return
        fits = shape[1:] == each.shape[1:] if each.kind == "rows" else shape == each.shape
        if not fits:
            self._faults.append(f"{each.target}: the base has {list(shape)}, {expert.name} {list(each.shape)}")
        elif each.kind == "rows" and each.rows and max(each.rows) >= shape[0]:
            self._faults.append(f"{each.target}: the base has {shape[0]} rows, {expert.name} one for {max(each.rows)}")

    def check(self, base_name: str | None) -> None:
        """Raise if anything did not fit; `base_name` is what the experts call their base.

        Raises:
            IncompatibleExpertsError: naming all that is not in the base, or of another shape or dtype there.
        """
        faults = list(dict.fromkeys(self._faults))
        if faults:
            more = f" (and {len(faults) - _MAX_SHOWN} more)" if len(faults) > _MAX_SHOWN else ""
            raise IncompatibleExpertsError(
                "the experts do not fit the base: " + "; ".join(faults[:_MAX_SHOWN]) + more,
                where=str(self._model.folder),
                mend=f"give the base that they were trained on ({base_name or 'they do not name it'})"
                + ("; if it is this one, save it again with the class that they were trained on" * self._lacks_names),
            )

    def _check_alone(self, target: str) -> None:
        """Note if another name of the experts' leads to the same tensor: the base cannot have been theirs."""
        stored = self._model.find(target)
        other = target if stored is None else self._targets.setdefault(stored, target)
        if other != target:
            self._faults.append(f"{other} and {target} are both {stored} in the base: one tensor cannot be both")

    def _shape(self, target: str) -> tuple[int, ...] | None:
        source = self._model.source(target)
        if source is None:
            self._faults.append(f"{target} is not in the base ({self._model.names.why_not(target)})")
            self._lacks_names = True
            return None
        self._check_alone(target)
        entry = self._model.checkpoint.entry(source)
        if entry.dtype not in _FLOATS:
            allowed = ", ".join(sorted(_FLOATS))
            self._faults.append(f"{target}: its dtype is {entry.dtype}, a soup is computed on {allowed}")
        return entry.shape
