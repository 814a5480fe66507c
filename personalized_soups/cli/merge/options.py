"""The options that `psoups merge` and `psoups merge-many` share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.errors import UsageError, choose_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from personalized_soups.files.copies import CopyMode

Experts = Annotated[
    list[Path] | None, typer.Option(help="Folder of experts, or one expert; may be repeated.", show_default=False)
]
MethodName = Annotated[
    str | None, typer.Option(help="Merge method; overrides the profile's. See psoups inspect --methods.")
]
Density = Annotated[float | None, typer.Option(help="Share of entries that a sparsifying method keeps.")]
Epsilon = Annotated[float | None, typer.Option(help="Half the width of della's keep-probabilities.")]
Lambda = Annotated[float | None, typer.Option("--lambda", help="Scale of what TIES' election leaves.")]
Seed = Annotated[int | None, typer.Option(help="Seed of a method that drops at random.")]
Rank = Annotated[int | None, typer.Option(help="Truncate to at most this rank; the error is reported.")]
Energy = Annotated[
    float | None, typer.Option(help="Truncate each module to the least rank that keeps this share of its energy.")
]
Target = Annotated[str, typer.Option("--for", help="peft, or vllm: one rank for all modules, nothing in patterns.")]
Device = Annotated[
    str, typer.Option(help="auto (the CPU), cpu or cuda. Sums of factors are computed on the CPU in any case.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the experts' own if left out.")]
Base = Annotated[
    str | None,
    typer.Option(help="Base model to read, for an adapter of experts with DoRA, biases, saved modules or tokens."),
]
SameBase = Annotated[bool, typer.Option("--same-base", help="Take different base names or fingerprints for one base.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def given_options(**values: float | None) -> dict[str, float]:
    """Return the method's options that were given, by their names (`lambda_` is `lambda`)."""
    return {name.rstrip("_"): value for name, value in values.items() if value is not None}


def checked_experts(experts: list[Path] | None) -> list[Path]:
    """Return the folders of experts.

    Raises:
        UsageError: if none is given.
    """
    if not experts:
        raise UsageError("no experts are given", where="--experts", mend="give --experts FOLDER")
    return experts


def check_one_base(base: str | None, into_base: str | None) -> None:
    """Raise if a base is given twice.

    Raises:
        UsageError: naming both options.
    """
    if base is not None and into_base is not None:
        raise UsageError(
            "an adapter made with a base and a full model are both asked for",
            where="--base, --into-base",
            mend="give one of the two",
        )


def checked_copy_mode(name: str) -> CopyMode:
    """Return the way of copying of that name.

    Raises:
        UsageError: if there is none.
    """
    modes: Mapping[str, CopyMode] = {"copy": "copy", "reflink": "reflink", "link": "link"}
    if name not in modes:
        raise UsageError(f"unknown way to copy {name!r}", where="--untouched", mend=choose_from(name, modes))
    return modes[name]
