"""The folder of one merged adapter: its tensors as they come, then its configuration and its record.

R rank, I in features, O out features.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.placement import blocks_of, of_blocks
from personalized_soups.adapters.provenance import (
    InputRecord,
    SoupRecord,
    TruncationRecord,
    library_versions,
    write_record,
)
from personalized_soups.errors import UsageError
from personalized_soups.files.file_names import CONFIG_FILE, SOUP_FILE, WEIGHTS_FILE
from personalized_soups.files.spool import Spool
from personalized_soups.files.writer import NAMES_OF_DTYPES, SafetensorsWriter, TensorSpec
from personalized_soups.merging.computing.dora import unscaled
from personalized_soups.merging.computing.module_soups import ModuleSoup
from personalized_soups.merging.computing.whole_tensors import WholeTensors
from personalized_soups.merging.planning.layout import Layout
from personalized_soups.merging.planning.plan import (
    MergePlan,
    PlannedModule,
    check_vllm_rank,
    torch_dtype,
    vllm_max_lora_rank,
)
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.finite import all_finite

_SPOOL_FILE = ".spool"


@dataclass(frozen=True, slots=True)
class Loss:
    """What a truncation lost: squared Frobenius norms of the delta and of what was taken from it."""

    energy: float
    lost: float

    @property
    def relative_error(self) -> float:
        """`|dW - dW_R| / |dW|`; 0 where dW is 0."""
        return (self.lost / self.energy) ** 0.5 if self.energy > 0 else 0.0


@dataclass(frozen=True, eq=False, slots=True)
class MergedModule:
    """One module of a merged adapter, on the CPU in the adapter's dtype.

    `beside` are its other tensors by their names in the file: a magnitude (DoRA), the bias of its B (lora_bias).
    """

    like: LoraModule
    factors: Factors
    loss: Loss
    beside: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, soup: ModuleSoup, plan: MergePlan) -> Self:
        """Round a module's soup once to the plan's dtype; at the plan's rank, unless an energy share decides.

        A DoRA adapter has `W' = m / |W + B A| (W + B A)`: with the soup `d W + G` it is `B A = d^-1 G`, truncated
        before it is divided, and `m = d |W + B A|` of the factors as they are written.

        Raises:
            UsageError: where a value does not fit into the dtype, or d is about 0.
        """
        assert soup.factors is not None, "a dense soup is truncated before it is held as an adapter"
        like, factors = soup.module.like, soup.factors
        scale_O = torch.ones(like.out_features, dtype=torch.float64) if soup.scale_O is None else soup.scale_O
        if soup.scale_O is not None:
            factors = unscaled(like.name, factors, scale_O)
        rounded = Factors(_rounded(like.a_name, factors.a_RI, plan), _rounded(like.b_name, factors.b_OR, plan))
        shapes = beside_shapes(like, plan.layout)
        values = {}
        if soup.dora is not None:
            values[plan.layout.magnitude_name(like.name)] = scale_O * soup.dora.norms(like.name, rounded)
        if soup.bias_O is not None:
            values[plan.layout.b_bias_name(like.name)] = soup.bias_O
        beside = {name: _rounded(name, value, plan).reshape(shapes[name]) for name, value in values.items()}
        merged = cls(like, rounded, Loss(soup.energy, soup.lost), beside)
        return merged if plan.energy is not None else merged.padded(plan.rank)

    @property
    def name(self) -> str:
        """The module's name in the base model."""
        return self.like.name

    @property
    def rank(self) -> int:
        """The rank of the change, of each block's where there are several."""
        return self.factors.rank // self.like.blocks

    def padded(self, rank: int) -> Self:
        """Return it at a higher rank: rows and columns of zeros are added, the delta stays the same."""
        if rank <= self.rank:
            return self
        blocks = blocks_of(self.factors, self.like.blocks)
        return replace(self, factors=of_blocks([each.padded(rank) for each in blocks]))

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Yield both factors, and what stands beside them, by their names in the file and in their shapes there."""
        yield self.like.a_name, self.factors.a_RI.reshape(a_shape(self.like, self.rank))
        yield self.like.b_name, self.factors.b_OR.reshape(b_shape(self.like, self.rank))
        yield from self.beside.items()


class AdapterWriter:
    """Writes one merged adapter into an empty folder, module by module; a context manager.

    Modules may come in any order and are not kept. Where an energy share gives each module a rank of its own they are
    set aside on the disk, since the file begins with the shapes of all.

    Args:
        folder: empty.
        plan: what is written.
        whole: the tensors that experts trained whole, where the plan has a base.
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
        """Write one module."""
        self._losses[module.name] = module.loss
        if self.plan.energy is None:
            self._write(self._writer, module)
            return
        a_RI, b_OR = self._spool.kept(module.factors.a_RI), self._spool.kept(module.factors.b_OR)
        self._aside.append(replace(module, factors=Factors(a_RI, b_OR)))

    def begin(self, module: MergedModule) -> None:
        """Write one module's A, and leave its B to `add`. For modules of the plan's own rank alone."""
        self._losses[module.name] = module.loss
        self._writer.write(module.like.a_name, module.factors.a_RI)

    def add(self, module: PlannedModule, start: int, values: Tensor) -> None:
        """Write the values of a module's B from the number `start` on, rounded to the adapter's dtype.

        Raises:
            UsageError: where a value does not fit into the dtype.
        """
        rounded = _rounded(module.like.b_name, values, self.plan)
        self._writer.write(module.like.b_name, rounded, start * rounded.element_size())

    def finish(self, device: torch.device, inputs: tuple[InputRecord, ...]) -> SoupRecord:
        """Write what is left: modules set aside, adapter_config.json, soup.json."""
        # modules came in the order in which threads were done, but the bytes shall not depend on it
        in_order = [module.name for module in self.plan.modules]
        losses = {name: self._losses[name] for name in in_order}
        if self._aside:
            own = {module.name: module.rank for module in self._aside}
            self._ranks = common_ranks(self.plan, {name: own[name] for name in in_order})
            self._writer = self._stack.enter_context(self._opened())
            for module in self._aside:
                self._write(self._writer, module)
        for name, start, part in () if self._whole is None else self._whole.parts():
            if not all_finite(part):
                raise _too_large(f"{name}: the soup has values", self.plan)
            self._writer.write(name, part, start)
        text = json.dumps(adapter_config(self.plan, self._ranks), indent=2, ensure_ascii=False)
        (self._folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        record = adapter_record(self.plan, device, self._ranks, losses, inputs)
        write_record(self._folder, record)
        return record

    def _opened(self) -> SafetensorsWriter:
        dtype = NAMES_OF_DTYPES[torch_dtype(self.plan.dtype)]
        specs = []
        for module in self.plan.modules:
            rank = self._ranks[module.name]
            specs.append(TensorSpec(module.like.a_name, dtype, a_shape(module.like, rank)))
            specs.append(TensorSpec(module.like.b_name, dtype, b_shape(module.like, rank)))
            beside = beside_shapes(module.like, self.plan.layout)
            specs.extend(TensorSpec(name, dtype, shape) for name, shape in beside.items())
        specs.extend([] if self._whole is None else self._whole.specs())
        return SafetensorsWriter(self._folder / WEIGHTS_FILE, specs, {"format": "pt"})

    def _write(self, writer: SafetensorsWriter, module: MergedModule) -> None:
        for name, tensor in module.padded(self._ranks[module.name]).named():
            writer.write(name, tensor)


def common_ranks(plan: MergePlan, own: Mapping[str, int]) -> dict[str, int]:
    """Return the rank at which each module is written: its own where an energy share decides, one for all for vLLM."""
    if plan.energy is not None and plan.target == "peft":
        return dict(own)
    rank = max(own.values())
    if plan.target == "vllm":
        check_vllm_rank(rank)
    return dict.fromkeys(own, rank)


def a_shape(like: LoraModule, rank: int) -> tuple[int, ...]:
    """Return the shape of a module's A in the file."""
    return (rank * like.blocks, like.in_features // math.prod(like.kernel), *like.kernel)


def b_shape(like: LoraModule, rank: int) -> tuple[int, ...]:
    """Return the shape of a module's B in the file."""
    return (like.out_features, rank * like.blocks, *(1 for _ in like.kernel))


def beside_shapes(like: LoraModule, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of what stands beside a module's factors in the file."""
    found: dict[str, tuple[int, ...]] = {}
    if layout.use_dora:
        ones = (1,) * len(like.kernel)
        found[layout.magnitude_name(like.name)] = (*ones[:1], like.out_features, *ones)
    if layout.lora_bias:
        found[layout.b_bias_name(like.name)] = (like.out_features,)
    return found


def _rounded(name: str, tensor: Tensor, plan: MergePlan) -> Tensor:
    # rounded before it is transferred: truncated factors are float64
    rounded = tensor.to(torch_dtype(plan.dtype)).to("cpu").contiguous()
    if not all_finite(rounded):
        raise _too_large(f"{name}: the soup has values up to {tensor.abs().max().item():g}", plan)
    return rounded


def _too_large(what: str, plan: MergePlan) -> UsageError:
    return UsageError(
        f"{what}, beyond {plan.dtype}",
        where="dtype",
        mend="take dtype=float32 or bfloat16, or smaller weights",
    )


def adapter_record(
    plan: MergePlan,
    device: torch.device,
    ranks: Mapping[str, int],
    losses: Mapping[str, Loss],
    inputs: tuple[InputRecord, ...],
) -> SoupRecord:
    """Return what soup.json says of a merged adapter whose modules have these ranks and losses."""
    rank = max(ranks.values())
    total = Loss(sum(loss.energy for loss in losses.values()), sum(loss.lost for loss in losses.values()))
    in_order = [module.name for module in plan.modules]
    truncation = TruncationRecord(
        rank=rank,
        energy=plan.energy,
        total=total.relative_error,
        modules={name: losses[name].relative_error for name in in_order},
        ranks={name: ranks[name] for name in in_order if ranks[name] != rank},
    )
    return SoupRecord(
        kind="adapter",
        profile=plan.profile.model_dump(mode="json"),
        method=plan.method.name,
        method_source=plan.method_source,
        options=dict(plan.options),
        encoding=plan.encoding,
        target=plan.target,
        experts=inputs,
        base=plan.base,
        base_folder=plan.base_folder,
        rank=rank,
        dtype=plan.dtype,
        device=str(device),
        truncation=truncation if plan.encoding == "truncated" else None,
        vllm_max_lora_rank=vllm_max_lora_rank(rank) if plan.fits_vllm else None,
        versions=library_versions("torch", "numpy"),
        files=tuple(sorted((CONFIG_FILE, WEIGHTS_FILE, SOUP_FILE))),
    )


def adapter_config(plan: MergePlan, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return what PEFT reads: rank and alpha are equal at every module, so that the scaling is 1."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: rank for name, rank in ranks.items() if rank != usual}
    table = {
        **plan.layout.config,
        "alpha_pattern": pattern,
        "base_model_name_or_path": plan.base.name,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": pattern,
        "revision": plan.revision,
        "task_type": plan.task_type,
        "use_rslora": False,
    }
    return dict(sorted(table.items()))


@contextmanager
def told_whose(plan: MergePlan) -> Iterator[None]:
    """Say in an error whose soup it is, among so many."""
    try:
        yield
    except UsageError as fault:
        user = plan.profile.user
        raise UsageError(f"{user!r}: {fault.what}", where=plan.profile.place("weights"), mend=fault.mend) from None
