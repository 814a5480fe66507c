"""Compare the tensors of a merged adapter with recomputed tensors, module by module.

Shapes: R = rank, I = in_features, O = out_features. E is the number of experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.placement import blocks_of, of_blocks
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.devices import torch_dtype
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.merging.computing.merged_modules import Loss, MergedModule
from personalized_soups.merging.computing.whole_tensors import WholeTensors
from personalized_soups.merging.verify.verification import Comparison, Difference, Distance, Fault, finite
from personalized_soups.merging.writing.adapter import MergedAdapter
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.linear import linear
from personalized_soups.methods.lowrank import decompose

# The largest allowed error of a product B A, relative to its norm, if the factors are not unique. It covers the errors
# of float32 sums of a few hundred entries, and singular vectors that rotate because their singular values are close.
PRODUCT_TOLERANCE = 1e-5

_METADATA = {"format": "pt"}


@dataclass(eq=False, slots=True)
class AdapterComparison:
    """Compares an adapter's weight file with the merged adapter, which is computed again.

    Attributes:
        file: the weight file.
        merged: the merged adapter to compute again.
        ranks: the ranks of the recomputed modules, by the module's name. `run` fills it.
        losses: the truncation losses of the recomputed modules, by the module's name. `run` fills it.
    """

    file: SafetensorsFile
    merged: MergedAdapter
    ranks: dict[str, int] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)
    _differences: list[Difference] = field(default_factory=list)
    _faults: list[Fault] = field(default_factory=list)

    def run(self, progress: Callable[[int, int], None] | None = None) -> Comparison:
        """Compute every module again and compare it with the file.

        Only the few modules that are being computed are in memory.

        Args:
            progress: a function that is called with the number of bytes that have been compared and the number of all
                bytes.
        """
        expected: set[str] = set()
        done, total = 0, len(self.file.data)
        for module in self.merged.modules():
            self.ranks[module.name], self.losses[module.name] = module.rank, module.loss
            names = {name for name, _ in module.named()}
            expected |= names
            self._compare(module)
            done += sum(entry.end - entry.start for name, entry in self.file.entries.items() if name in names)
            if progress is not None:
                progress(done, total)
        if self.merged.whole is not None:
            expected |= self._compare_whole(self.merged.whole)
        for name in sorted(set(self.file.entries) - expected):
            self._faults.append(Fault("tensor", name, "does not belong to this soup"))
        if dict(self.file.metadata) != _METADATA:
            what = f"has the header metadata {dict(self.file.metadata)}, expected {_METADATA}"
            self._faults.append(Fault("configuration", self.file.path.name, what))
        return Comparison(len(expected), tuple(self._differences), tuple(self._faults))

    def written_rank(self, module: MergedModule) -> int:
        """Return the rank of a module in the file.

        If the file has no A of the module, return the recomputed rank.
        """
        entry = self.file.entries.get(module.like.a_name)
        return entry.shape[0] // module.like.blocks if entry is not None and entry.shape else module.rank

    def _compare(self, module: MergedModule) -> None:
        module = module.padded(self.written_rank(module))
        tensors = dict(module.named())
        faults = [fault for name, tensor in tensors.items() if (fault := self._misfit(name, tensor)) is not None]
        if faults:
            self._faults += faults
            return
        differing = [name for name, tensor in tensors.items() if not same_bytes(self.file.tensor(name), tensor)]
        if not differing:
            return
        plan = self.merged.plan
        factors = [name for name in differing if name not in module.extras]
        if factors and not (plan.encoding == "stacked" and plan.method.family == "linear"):
            self._differences += self._by_product(module, factors)
            differing = [name for name in differing if name in module.extras]
        self._differences += [self._by_element(module, name, tensors[name]) for name in differing]

    def _compare_whole(self, whole: WholeTensors) -> set[str]:
        """Compare the tensors that experts trained whole, part by part. Return the names of these tensors."""
        specs = {spec.name: spec for spec in whole.specs()}
        distances: dict[str, Distance] = {}
        for name, spec in specs.items():
            entry = self.file.entries.get(name)
            if entry is None:
                self._faults.append(Fault("tensor", name, "is missing from the file"))
            elif (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
                what = (
                    f"has dtype {entry.dtype} and shape {list(entry.shape)}, expected {spec.dtype} {list(spec.shape)}"
                )
                self._faults.append(Fault("tensor", name, what))
            else:
                distances[name] = Distance()
        for name, start, part in whole.parts():
            if name in distances:
                first = start // part.element_size()
                written = self.file.tensor(name).reshape(-1)[first : first + part.numel()]
                if same_bytes(written, part):
                    distances[name].add_equal(part)
                else:
                    distances[name].add(written, part, _roundings(part))
        self._differences += [distance.result(name) for name, distance in distances.items() if not distance.is_equal]
        return set(specs)

    def _misfit(self, name: str, tensor: Tensor) -> Fault | None:
        entry = self.file.entries.get(name)
        if entry is None:
            return Fault("tensor", name, "is missing from the file")
        dtype = self.file.tensor(name).dtype
        if (dtype, entry.shape) == (tensor.dtype, tuple(tensor.shape)):
            return None
        return Fault(
            "tensor",
            name,
            f"has dtype {dtype} and shape {list(entry.shape)}, expected {tensor.dtype} {list(tensor.shape)}",
        )

    def _by_element(self, module: MergedModule, name: str, tensor: Tensor) -> Difference:
        """Compare one tensor of stacked factors element by element.

        The A's are copies, so they must be equal. The B's are sums of w s B (weight, scaling and B of an expert), so
        they may differ by rounding.
        """
        distance = Distance()
        if name == module.like.a_name:
            room = None
        elif name == module.like.b_name and not self.merged.plan.layout.use_dora:
            room = self._room(module).reshape(tensor.shape)
        else:
            room = _roundings(tensor)
        distance.add(self.file.tensor(name), tensor, room)
        return distance.result(name)

    def _room(self, module: MergedModule) -> Tensor:
        """Return how far two computations of B may differ: `(E + 2) 2^-24 sum |w s B|` plus one ulp of the dtype.

        A float32 sum has an error of at most (E + 1) 2^-24 sum |w s B| (see methods.product). A float64 sum has an
        error of at most half an ulp of float32. Both sums are then rounded to the dtype. If they are on different sides
        of a midpoint, the results differ by one ulp.
        """
        plan = self.merged.plan
        bank = ExpertBank([self.merged.library[expert.name] for expert in plan.experts])
        stack = bank.read(module.name)
        weights = [abs(plan.weights[index]) for index in stack.experts]
        parts = zip(*(blocks_of(_magnitudes(factors), module.like.blocks) for factors in stack.factors), strict=True)
        blocks = [[linear(part, weights, stack.basis)] for part in parts] or [[] for _ in range(module.like.blocks)]
        if plan.on_folder is not None and module.name in (on := LoraAdapter.open(plan.on_folder)).modules:
            added = blocks_of(_magnitudes(on.factors(module.name)), module.like.blocks)
            blocks = [[*own, new] for own, new in zip(blocks, added, strict=True)]
        stacked = [linear(own, [1.0] * len(own)).padded(module.rank) for own in blocks]
        sums = of_blocks(stacked).b_OR.double()
        kind = torch.finfo(torch_dtype(plan.dtype))
        # use the ulp of the rounded value: rounding up may reach the next power of two, where the ulp is twice as large
        ulp = torch.maximum(sums, module.factors.b_OR.double().abs()) * kind.eps + kind.smallest_normal * kind.eps
        return sums * ((len(plan.experts) + 2) * 2.0**-24) + ulp

    def _by_product(self, module: MergedModule, differing: list[str]) -> list[Difference]:
        """Compare the products B A instead of the factors.

        The factors are not unique, because a rotation of both factors does not change their product.
        """
        like = module.like
        written = Factors(self.file.tensor(like.a_name).flatten(1), self.file.tensor(like.b_name).flatten(1))
        apart = size = room = 0.0
        pairs = zip(blocks_of(written, like.blocks), blocks_of(module.factors, like.blocks), strict=True)
        for got, want in pairs:
            if not (bool(torch.isfinite(got.a_RI).all()) and bool(torch.isfinite(got.b_OR).all())):
                return [Difference(name, None, None, is_rounding=False) for name in differing]
            both = decompose([got, want])
            # `.energy` is the squared norm of the weighted sum; it is computed from the small core of the decomposition
            apart += both.truncate([1.0, -1.0], energy=1.0).energy
            size += both.truncate([0.0, 1.0], energy=1.0).energy
            room += _rounding(want, torch_dtype(self.merged.plan.dtype)) ** 2
        allowed = PRODUCT_TOLERANCE * math.sqrt(size) + math.sqrt(room)
        relative = math.sqrt(apart / size) if size > 0 else (0.0 if apart == 0 else math.inf)
        largest = {name: self._largest(name, tensor) for name, tensor in module.named()}
        is_rounding = math.sqrt(apart) <= allowed
        return [Difference(name, finite(largest[name]), finite(relative), is_rounding) for name in differing]

    def _largest(self, name: str, tensor: Tensor) -> float:
        return float((self.file.tensor(name).double() - tensor.double()).abs().max())


def same_bytes(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have equal bytes. NaNs and the signs of zeros are compared too.

    The tensors must have the same dtype and shape.
    """
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _roundings(tensor: Tensor) -> Tensor:
    """Return how far two computations of norms, magnitudes or tensors that are trained whole may differ.

    In these computations, few terms cancel.
    """
    numbers = torch.finfo(tensor.dtype)
    return tensor.double().abs() * (numbers.eps + 2.0**-20) + numbers.smallest_normal


def _magnitudes(factors: Factors) -> Factors:
    return Factors(factors.a_RI, factors.b_OR.abs(), abs(factors.scaling))


def _rounding(factors: Factors, dtype: torch.dtype) -> float:
    """Return how far B A changes if each element of B and A changes by an ulp: `|B| |dA| + |dB| |A|`.

    |A| and |B| are spectral norms. |dA| and |dB| are the Frobenius norms of the changes.
    """
    a_RI, b_OR = factors.a_RI.double(), factors.b_OR.double()
    a_norm, b_norm = float(a_RI.norm()), float(b_OR.norm())
    a_most = math.sqrt(max(float(torch.linalg.eigvalsh(a_RI @ a_RI.T)[-1]), 0.0))
    b_most = math.sqrt(max(float(torch.linalg.eigvalsh(b_OR.T @ b_OR)[-1]), 0.0))
    return torch.finfo(dtype).eps * (b_most * a_norm + b_norm * a_most)
