"""Options that several commands have, each defined once. A command gives the default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# Seeds of NumPy, and so of transformers, have 32 bits.
MAX_SEED = 2**32 - 1

# The base model, and how it is loaded
BaseOption = Annotated[
    str, typer.Option(help='Base model: a folder, a Hugging Face model id, or "tiny" for the embedded base.')
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's own dtype.")]
SameBaseOption = Annotated[
    bool, typer.Option("--same-base", help="Accept base models with different names or fingerprints as one base.")
]

# Experts and profiles
ExpertsOption = Annotated[list[Path], typer.Option(help="Folder of experts. May be repeated.")]
WeightsOption = Annotated[
    str | None, typer.Option(help="Mixing weights instead of a profile, e.g. a=0.6,b=0.6.", show_default=False)
]
AllowOpposedOption = Annotated[
    bool, typer.Option("--allow-opposed", help="Allow weights on two sides of one dimension.")
]
DimensionsOption = Annotated[
    Path | None, typer.Option(help="Your own catalogue of preference dimensions instead of the shipped catalogue.")
]

# Sampling
PromptsOption = Annotated[
    Path, typer.Option(help='File of prompts: one per line, or JSON Lines with a "prompt" in each line.')
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the likeliest token.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Answers generated at once.")]
SeedOption = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]

# Merging
MethodOption = Annotated[
    str | None, typer.Option(help="Merge method instead of the profile's. psoups inspect --methods lists all methods.")
]
DensityOption = Annotated[float | None, typer.Option(help="Share of entries that a sparsifying method keeps.")]
EpsilonOption = Annotated[
    float | None, typer.Option(help="Half the width of della's keep-probabilities around the density.")
]
LambdaOption = Annotated[float | None, typer.Option("--lambda", help="Factor on the result that TIES elects.")]
MethodSeedOption = Annotated[int | None, typer.Option(help="Random seed of a method that drops entries.")]
RankOption = Annotated[int | None, typer.Option(help="Truncate to at most this rank and report the error.")]
EnergyOption = Annotated[
    float | None, typer.Option(help="Truncate each module to the lowest rank that keeps this share of its energy.")
]
TargetOption = Annotated[
    str,
    typer.Option("--for", help="peft, or vllm: the same rank for every module, with no rank or alpha patterns."),
]
MergeExpertsOption = Annotated[
    list[Path] | None, typer.Option(help="Folder of experts, or one expert. May be repeated.", show_default=False)
]
MergeDeviceOption = Annotated[
    str, typer.Option(help="auto, cpu or cuda. Sums of factors are always computed on the CPU.")
]
MergeDtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 instead of the experts' own dtype.")
]
MergeBaseOption = Annotated[
    str | None,
    typer.Option(
        help="Base model to read. Adapters of experts with DoRA, biases, saved modules or trained tokens need it."
    ),
]

# Output
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that psoups wrote.")]
RestartOption = Annotated[bool, typer.Option("--overwrite", help="Start again if --out holds an earlier run.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Studies and stores
WorkersOption = Annotated[int, typer.Option(min=0, help="Number of worker processes; 0 starts one per core, up to 6.")]
_STORE = "a SQLite file, sqlite:///FILE, or postgresql://USER@HOST/DATABASE"
StoreOption = Annotated[str, typer.Option(envvar="PSOUPS_PROFILES", help=f"Profile store: {_STORE}.")]
ServedStoreOption = Annotated[
    str | None,
    typer.Option(envvar="PSOUPS_PROFILES", help=f"Profile store: {_STORE}. A missing SQLite file is created."),
]
