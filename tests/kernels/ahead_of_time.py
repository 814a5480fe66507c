"""Compile every launch of every kernel for real GPUs, on a machine that has none; exit status 1 where one fails.

python -m tests.kernels.ahead_of_time [CAPABILITY ...]      default: 90, then one variant of each dtype for 80 and 100

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
from typing import Any

import torch
from torch import Tensor

from personalized_soups.kernels import add_gated, scale_columns, source, weighted_sums
from personalized_soups.kernels.add_gated import BlockDiagonal

FULL = 90
OTHERS = (80, 100)
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
        self._seen[
            Launch(self._kernel.__name__, tuple(signature), tuple(constants), tuple(divisible), options)
        ] = None


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
    missing = kernels.keys() - {launch.kernel for launch in seen}
    assert not missing, f"never launched: {missing}"
    return list(seen)


def compiled(launch: Launch, capability: int) -> int:
    """Compile a launch for a compute capability (90 is Hopper's 9.0) and return the bytes of the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(source, launch.kernel)
    built = triton.compile(
        ASTSource(
            fn=kernel,
            signature=dict(launch.signature),
            constexprs=dict(launch.constants),
            attrs={(place,): [["tt.divisibility", 16]] for place in launch.divisible},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=dict(launch.options),
    )
    return len(built.asm["cubin"])


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
                yield lambda product=product, total=total, gate=gate, factors=factors: add_gated.launch(  # type: ignore[misc]
                    product, product[:, total:], gate, factors.blocks[0], factors.columns_K, factors.tiles,
                    is_aligned=factors.is_aligned,
                )  # fmt: skip


def _sum_calls(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    # the 8B shape's B's of one expert, an odd number of values, and more than 2^31 numbers
    for values in (22_020_096, 1001):
        for users in (1, 3, 16, 40):
            for experts in (1, 6, 40):
                experts_EP = torch.empty(experts, values)
                weights_UE = torch.empty(users, experts)
                out_UP = torch.empty(users, values, dtype=dtype)
                yield lambda a=weights_UE, b=experts_EP, c=out_UP: weighted_sums.launch(a, b, c)  # type: ignore[misc]


def _scale_calls(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    for rows, columns in ((22_020_096 // 16, 96), (1001, 33), (5, 912), (7, 1)):
        pristine_OK, scales_K = torch.empty(rows, columns), torch.empty(columns)
        out_OK = torch.empty(rows, columns, dtype=dtype)
        yield lambda a=pristine_OK, b=scales_K, c=out_OK: scale_columns.launch(a, b, c)  # type: ignore[misc]


def calls(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Yield calls of every launcher for models in a dtype: real shapes, odd ones, and those of one row, gate or rank."""
    yield from _gated_calls(dtype)
    yield from _sum_calls(dtype)
    yield from _scale_calls(dtype)


def launches(dtype: torch.dtype) -> list[Launch]:
    """Return the different launches for models in a dtype."""
    return recorded(calls(dtype))


def _few(found: list[Launch]) -> list[Launch]:
    """Return one launch of each kernel and each set of constexprs that are flags."""
    chosen = {}
    for launch in found:
        flags = tuple((name, value) for name, value in launch.constants if isinstance(value, bool))
        chosen.setdefault((launch.kernel, flags), launch)
    return list(chosen.values())


def main(capabilities: list[int]) -> int:
    """Compile and print a line for each launch; return 1 where one failed."""
    warnings.simplefilter("error")
    failed = 0
    for dtype in DTYPES:
        every = launches(dtype)
        for capability in capabilities or (FULL, *OTHERS):
            for launch in every if capabilities or capability == FULL else _few(every):
                told = ", ".join(f"{name}={value}" for name, value in launch.constants)
                line = f"sm_{capability} {_SHORT[dtype]} {launch.kernel} {told} divisible {list(launch.divisible)}"
                try:
                    print(f"ok {line}: {compiled(launch, capability)} bytes", flush=True)
                except Exception as error:
                    failed += 1
                    print(f"failed {line}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]]))
