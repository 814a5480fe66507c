"""Write the folder of one merged adapter. The tensors are written as they are computed, and the JSON files last.

Shapes: R = rank, I = in_features, O = out_features.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from personalized_soups.adapters.provenance import (
    InputRecord,
    SoupRecord,
    write_record,
)
from personalized_soups.devices import torch_dtype
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from personalized_soups.files.spool import Spool
from personalized_soups.files.writer import NAMES_OF_DTYPES, SafetensorsWriter, TensorSpec
from personalized_soups.merging.computing.merged_modules import (
    Loss,
    MergedModule,
    a_shape,
    b_shape,
    common_ranks,
    extra_shapes,
    rounded,
    too_large,
)
from personalized_soups.merging.computing.whole_tensors import WholeTensors
from personalized_soups.merging.planning.plan import MergePlan, PlannedModule
from personalized_soups.merging.writing.adapter_record import adapter_config, adapter_record
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.finite import all_finite

_SPOOL_FILE = ".spool"


class AdapterWriter:
    """A context manager that writes one merged adapter into an empty folder, module by module.

    The modules may come in any order and are not kept in memory. If the plan has an energy share, the ranks are known
    only after the last module. A safetensors file begins with the shapes of all tensors, so the modules are then first
    written to a temporary file.

    Args:
        folder: an empty folder.
        plan: the plan of the merge.
        whole: the soup's tensors that do not come from low-rank factors; None if the plan has no base.
    """

    def __init__(self, folder: Path, plan: MergePlan, whole: WholeTensors | None = None) -> None:
        self._folder = folder
        self.plan = plan
        self._whole = whole
        self._losses: dict[str, Loss] = {}
        self._aside: list[MergedModule] = []
        self._ranks = dict.fromkeys((module.name for module in plan.modules), plan.rank)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self.plan.energy is None:
            self._writer = self._stack.enter_context(self._opened())
        else:
            self._spool = self._stack.enter_context(Spool(self._folder / _SPOOL_FILE))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def put(self, module: MergedModule) -> None:
        """Write all tensors of one module. Several threads may call this method at once."""
        self._losses[module.name] = module.loss
        if self.plan.energy is None:
            self._write(self._writer, module)
            return
        a_RI, b_OR = self._spool.kept(module.factors.a_RI), self._spool.kept(module.factors.b_OR)
        self._aside.append(replace(module, factors=Factors(a_RI, b_OR)))

    def begin(self, module: MergedModule) -> None:
        """Write the A of a module that has the plan's rank. `add` then writes the module's B."""
        self._losses[module.name] = module.loss
        self._writer.write(module.like.a_name, module.factors.a_RI)

    def add(self, module: PlannedModule, start: int, values: Tensor) -> None:
        """Round some values of a module's B to the adapter's dtype and write them.

        Args:
            module: the planned module.
            start: the index of the first value in the flattened B.
            values: the values.

        Raises:
            UsageError: if a value does not fit into the adapter's dtype.
        """
        part = rounded(module.like.b_name, values, self.plan)
        self._writer.write(module.like.b_name, part, start * part.element_size())

    def finish(self, device: torch.device, inputs: tuple[InputRecord, ...]) -> SoupRecord:
        """Write the modules from the temporary file, the whole tensors, adapter_config.json and soup.json.

        Returns:
            The content of soup.json.
        """
        # threads finish modules in any order, but the records' bytes must not depend on it
        in_order = [module.name for module in self.plan.modules]
        losses = {name: self._losses[name] for name in in_order}
        if self._aside:
            ranks = {module.name: module.rank for module in self._aside}
            self._ranks = common_ranks(self.plan, {name: ranks[name] for name in in_order})
            self._writer = self._stack.enter_context(self._opened())
            for module in self._aside:
                self._write(self._writer, module)
        for name, start, part in () if self._whole is None else self._whole.parts():
            if not all_finite(part):
                raise too_large(f"{name}: the soup has very large values", self.plan)
            self._writer.write(name, part, start)
        text = json.dumps(adapter_config(self.plan, self._ranks), indent=2, ensure_ascii=False)
        (self._folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        record = adapter_record(self.plan, device, self._ranks, losses, inputs)
        write_record(self._folder, record)
        return record

    def _opened(self) -> SafetensorsWriter:
        """Return a writer for the adapter's weights file, whose header needs the ranks of all modules."""
        dtype = NAMES_OF_DTYPES[torch_dtype(self.plan.dtype)]
        specs = []
        for module in self.plan.modules:
            rank = self._ranks[module.name]
            specs.append(TensorSpec(module.like.a_name, dtype, a_shape(module.like, rank)))
            specs.append(TensorSpec(module.like.b_name, dtype, b_shape(module.like, rank)))
            extras = extra_shapes(module.like, self.plan.layout)
            specs.extend(TensorSpec(name, dtype, shape) for name, shape in extras.items())
        specs.extend([] if self._whole is None else self._whole.specs())
        return SafetensorsWriter(self._folder / WEIGHTS_FILE, specs, {"format": "pt"})

    def _write(self, writer: SafetensorsWriter, module: MergedModule) -> None:
        for name, tensor in module.padded(self._ranks[module.name]).named():
            writer.write(name, tensor)
