"""Compile every launch of every kernel for real GPUs, on a machine that has none; exit status 1 where one fails.

python -m tests.kernels.ahead_of_time [CAPABILITY [DTYPE]]      e.g. 90 bf16; all of 80, 90 and 100 where left out

The launches are recorded, not listed: each launcher is called with tensors of the shapes that models have, and what it
would launch is compiled with the specialisations that Triton makes of those arguments (integers that are 1 or divisible
by 16, aligned pointers). So a kernel that gains an argument needs no change here. It runs in a process of its own,
without TRITON_INTERPRET, which makes other objects of the kernels.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from personalized_soups.kernels import add_gated, scale_columns, source, weighted_sums
from personalized_soups.kernels.add_gated import BlockDiagonal

# Every launch is compiled for Hopper, and of each kernel's flags one for Ampere and Blackwell.
FULL = 90
CAPABILITIES = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHORT = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch as Triton specialises it.

    Args:
        kernel: its name in kernels/source.py.
        signature: the type of each argument, in order.
        constants: the values of constexprs, and of integers that are 1.
        divisible: the arguments that are multiples of 16.
        options: of the compiler.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


class _Recorder:
    """Stands in for a kernel: notes what it would be launched with."""

    def __init__(self, kernel: Any, seen: dict[Launch, None]) -> None:
        self._kernel, self._seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return self._launch

    def _launch(self, *arguments: Any, **keywords: Any) -> None:
        names = self._kernel.arg_names
        fixed = {name: keywords.pop(name) for name in names if name in keywords}
        signature, constants, divisible = [], list(fixed.items()), []
        for place, (name, value) in enumerate(zip(names, [*arguments, *fixed.values()], strict=True)):
            if name in fixed:
                signature.append((name, "constexpr"))
            elif isinstance(value, Tensor):
                signature.append((name, f"*{_SHORT[value.dtype]}"))
                divisible += [place] if value.data_ptr() % 16 == 0 else []
            elif value == 1:
                signature.append((name, "constexpr"))
                constants.append((name, 1))
            else:
                signature.append((name, "i32" if value < 2**31 else "i64"))
                divisible += [place] if value % 16 == 0 else []
        options = tuple(keywords.items())
        self._seen[Launch(self._kernel.__name__, tuple(signature), tuple(constants), tuple(divisible), options)] = None


def recorded(calls: Iterator[Callable[[], None]]) -> list[Launch]:
    """Return the different launches that these calls make."""
    seen: dict[Launch, None] = {}
    kernels = {name: kernel for name, kernel in vars(source).items() if name.endswith("_kernel")}
    for name, kernel in kernels.items():
        setattr(source, name, _Recorder(kernel, seen))
    try:
        for call in calls:
            call()
    finally:
        for name, kernel in kernels.items():
            setattr(source, name, kernel)
    return list(seen)


def built(launch: Launch, capability: int) -> Any:
    """Compile a launch for a compute capability (90 is Hopper's 9.0) and return what Triton makes of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(source, launch.kernel)
    return triton.compile(
        ASTSource(
            fn=kernel,
            signature=dict(launch.signature),
            constexprs=dict(launch.constants),
            attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=dict(launch.options),
    )


def _gated_calls(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    # (columns of y and first outputs of its layers), ranks of each layer, rows of A x
    aligned = ((4096, 1024, 1024), 96)
    odd = ((7, 70), 5)
    for outputs, ranks in (aligned, odd, ((4096,), 96)):
        for rows, gates in ((1, 1), (16, 16), (32, 16), (33, 3), (2048, 1)):
            for has_columns in (False, True):
                total, num_ranks = sum(outputs), ranks * len(outputs)
                product = torch.empty(rows, total + num_ranks, dtype=dtype)
                buffer = torch.empty(ranks * total, dtype=dtype)
                blocks, starts, offset, start = [], [], 0, 0
                for size in outputs:
                    blocks.append(buffer[offset : offset + ranks * size].view(ranks, size))
                    starts.append(start)
                    offset, start = offset + ranks * size, start + size
                columns = torch.arange(num_ranks) if has_columns else None
                factors = BlockDiagonal.of(blocks, starts, columns)
                gate = torch.empty(gates, num_ranks + 8, dtype=dtype)[:, :num_ranks]
                yield (
                    lambda product=product, total=total, gate=gate, factors=factors: add_gated.launch(  # type: ignore[misc]
                        product, product[:, total:], gate, factors
                    )
                )


def _sum_calls(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    # the 8B shape's B's of one expert, and an odd number of values
    for values in (22_020_096, 1001):
        for users in (1, 3, 16, 40):
            for experts in (1, 6, 40):
                experts_EP = torch.empty(experts, values)
                weights_UE = torch.empty(users, experts)
                out_UP = torch.empty(users, values, dtype=dtype)
                yield partial(weighted_sums.launch, weights_UE, experts_EP, out_UP)


def _scale_calls(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    for rows, columns in ((22_020_096 // 16, 96), (5000, 24), (5000, 12), (1001, 33), (5, 912), (7, 1)):
        pristine_OK, scales_K = torch.empty(rows, columns), torch.empty(columns)
        out_OK = torch.empty(rows, columns, dtype=dtype)
        yield partial(scale_columns.launch, pristine_OK, scales_K, out_OK)


def calls(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Yield calls of every launcher for models in a dtype: real shapes, odd ones, and ones of one row or rank."""
    yield from _gated_calls(dtype)
    yield from _sum_calls(dtype)
    yield from _scale_calls(dtype)


def launches(dtype: torch.dtype) -> list[Launch]:
    """Return the different launches for models in a dtype, at least one of every kernel."""
    found = recorded(calls(dtype))
    missing = {name for name in vars(source) if name.endswith("_kernel")} - {launch.kernel for launch in found}
    assert not missing, f"never launched: {missing}"
    return found


def _few(found: list[Launch]) -> list[Launch]:
    """Return one launch of each kernel and each set of its flags."""
    chosen: dict[tuple[str, tuple[Any, ...]], Launch] = {}
    for launch in found:
        flags = tuple((name, value) for name, value in launch.constants if isinstance(value, bool))
        chosen.setdefault((launch.kernel, flags), launch)
    return list(chosen.values())


def failures(capability: int, dtype: torch.dtype) -> int:
    """Compile, write a line for each launch, and return how many failed."""
    every = launches(dtype)
    failed = 0
    for launch in every if capability == FULL else _few(every):
        constants = ", ".join(f"{name}={value}" for name, value in launch.constants)
        line = f"sm_{capability} {_SHORT[dtype]} {launch.kernel} {constants} divisible {list(launch.divisible)}"
        try:
            outcome = f"{len(built(launch, capability).asm['cubin'])} bytes"
        except Exception as error:  # any error of Triton, LLVM or ptxas
            failed += 1
            outcome = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        sys.stdout.write(f"{line}: {outcome}\n")
    return failed


def main(arguments: list[str]) -> int:
    """Compile what the arguments name; return 1 where a launch failed."""
    warnings.simplefilter("error")
    capabilities = [int(arguments[0])] if arguments else CAPABILITIES
    dtypes = [dtype for dtype in DTYPES if _SHORT[dtype] in arguments[1:] or len(arguments) < 2]
    return int(sum(failures(capability, dtype) for capability in capabilities for dtype in dtypes) > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
