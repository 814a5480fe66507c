"""Options that several commands share. Each command sets its own default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

# NumPy accepts seeds of 32 bits, and transformers also seeds NumPy.
MAX_SEED = 2**32 - 1

# The base model, and how it is loaded
BaseOption = Annotated[
    str,
    typer.Option(
        help='Base model: "tiny" (embedded), "smollm2" (a small real model), a folder, a GGUF file, or a Hugging Face '
        "model id."
    ),
]
OnOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the LoRA adapter, such as an SFT adapter, on top of which the experts are trained.",
        show_default=False,
    ),
]
DeviceOption = Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")]
DtypeOption = Annotated[str, typer.Option(help="Dtype: float32, bfloat16, float16, or auto for the base's own dtype.")]
SameBaseOption = Annotated[
    bool, typer.Option("--same-base", help="Treat base models with different names or fingerprints as the same base.")
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
    Path, typer.Option(help='File of prompts: one prompt per line, or JSON Lines with the key "prompt".')
]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]
TemperatureOption = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature. With 0, the likeliest token is always chosen.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Number of answers generated at once.")]
SeedOption = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]

# Merging
MethodOption = Annotated[
    str | None,
    typer.Option(help="Merge method instead of the profile's method. psoups inspect --methods lists all methods."),
]
DensityOption = Annotated[float | None, typer.Option(help="Share of entries that a sparsifying method keeps.")]
EpsilonOption = Annotated[
    float | None, typer.Option(help="Half the width of the range of della's keep probabilities around the density.")
]
LambdaOption = Annotated[
    float | None, typer.Option("--lambda", help="Factor by which the result of the TIES election is multiplied.")
]
MethodSeedOption = Annotated[
    int | None, typer.Option(help="Random seed of a merge method that drops entries at random.")
]
RankOption = Annotated[
    int | None, typer.Option(help="Truncate the merged adapter to at most this rank, and report the truncation error.")
]
EnergyOption = Annotated[
    float | None, typer.Option(help="Truncate each module to the lowest rank that keeps this share of its energy.")
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--for",
        help="Library that loads the adapter: peft or vllm. For vllm, all modules have the same rank and alpha.",
    ),
]
MergeOnOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the adapter, such as an SFT adapter, on top of which the experts were trained. The output then "
        "includes its delta once. Required with --into-base for such experts.",
        show_default=False,
    ),
]
MergeExpertsOption = Annotated[
    list[Path] | None, typer.Option(help="Folder of experts, or one expert. May be repeated.", show_default=False)
]
MergeDeviceOption = Annotated[
    str, typer.Option(help="Device: auto, cpu or cuda. Sums of LoRA factors are always computed on the CPU.")
]
MergeDtypeOption = Annotated[
    str | None, typer.Option(help="Output dtype: float32, bfloat16 or float16, instead of the experts' own dtype.")
]
MergeBaseOption = Annotated[
    str | None,
    typer.Option(
        help="Base model. Required for an adapter of experts with DoRA, biases, saved modules or trained tokens."
    ),
]

# Output
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output that psoups wrote.")]
RestartOption = Annotated[bool, typer.Option("--overwrite", help="Discard an earlier run in --out, and start again.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# Studies and stores
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Number of worker processes. With 0, one per core, but at most 6.")
]
_STORE = "a SQLite file, sqlite:///FILE, or postgresql://USER@HOST/DATABASE"
StoreOption = Annotated[str, typer.Option(envvar="PSOUPS_PROFILES", help=f"Profile store: {_STORE}.")]
ServedStoreOption = Annotated[
    str | None,
    typer.Option(envvar="PSOUPS_PROFILES", help=f"Profile store: {_STORE}. A missing SQLite file is created."),
]

ServedQuestionsOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of questions from psoups questions make. Users answer them to get a profile. Requires --profiles."
    ),
]
