"""Resolve the values of `--base` and `--dtype`, and choose the shipped catalogue and recipe for a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from personalized_soups.errors import UsageError, choose_from

if TYPE_CHECKING:
    from personalized_soups.generation.loading import Dtype

EMBEDDED = "tiny"

# If no recipe is given, a base with fewer bytes of weights is trained with the recipe of the tiny base.
_TINY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a base model is loaded.

    Attributes:
        base: the value of --base: a folder, a model id, or `tiny`.
        device: `auto`, `cpu` or `cuda`.
        dtype: the dtype of the loaded model.
        same_base: treat base models with different names or fingerprints as the same base.
    """

    base: str
    device: str
    dtype: Dtype
    same_base: bool = False

    @property
    def path(self) -> str:
        """The base's folder or model id."""
        return resolve_base(self.base)


def resolve_base(base: str) -> str:
    """Return the folder of the embedded base if `base` is `tiny`, else return `base` unchanged.

    A user who has a folder called tiny writes `./tiny`.
    """
    if base != EMBEDDED:
        return base
    from personalized_soups.tiny import BASE_FOLDER

    return str(BASE_FOLDER)


def catalogue_of(base: str, dimensions: Path | None) -> Path:
    """Return `dimensions` if it is given, else the path of the shipped catalogue for the base.

    The embedded base has its own shipped catalogue, with its own scorers.
    """
    from personalized_soups.declare.shipped import shipped_recipe

    return dimensions or shipped_recipe(f"dimensions/{'tiny' if base == EMBEDDED else 'psoups'}.yaml")


def recipe_of(base: str, recipe: Path | None) -> Path:
    """Return `recipe` if it is given, else the path of the shipped training recipe for the size of the base.

    A model id counts as a large base, because its size is not known.
    """
    from personalized_soups.declare.shipped import shipped_recipe

    folder = Path(resolve_base(base))
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else _TINY_BYTES
    return recipe or shipped_recipe("train/tiny.yaml" if num_bytes < _TINY_BYTES else "train/llama-7b.yaml")


def checked_dtype(name: str) -> Dtype:
    """Check the value of `--dtype` and return it.

    Raises:
        UsageError: if the dtype is unknown.
    """
    from personalized_soups.generation.loading import Dtype

    known: tuple[Dtype, ...] = get_args(Dtype)
    for dtype in known:
        if dtype == name:
            return dtype
    raise UsageError(f"unknown dtype {name!r}", where="--dtype", mend=choose_from(name, known))
