"""The values of `--base` and `--dtype`, and the shipped files that match a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from personalized_soups.errors import UsageError, choose_from

if TYPE_CHECKING:
    from personalized_soups.generation.loading import Dtype

EMBEDDED = "tiny"

# If no recipe is given, a base of fewer bytes is trained by the recipe of the tiny base.
_TINY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a base model is loaded.

    Attributes:
        base: the base as the user names it: a folder, a model id, or `tiny`.
        device: auto, cpu or cuda.
        dtype: the dtype of the loaded model.
        same_base: accept bases with different names or fingerprints as one base.
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
    """Return the folder or model id of a base. `tiny` is the embedded base; a folder of that name is `./tiny`."""
    if base != EMBEDDED:
        return base
    from personalized_soups.tiny import BASE_FOLDER

    return str(BASE_FOLDER)


def catalogue_of(base: str, dimensions: Path | None) -> Path:
    """Return the given catalogue's file, or the shipped catalogue. The embedded base has its own, with its scorers."""
    from personalized_soups.declare.shipped import shipped_recipe

    return dimensions or shipped_recipe(f"dimensions/{'tiny' if base == EMBEDDED else 'psoups'}.yaml")


def recipe_of(base: str, recipe: Path | None) -> Path:
    """Return the given training recipe's file, or the shipped recipe for the base's size.

    A model id counts as a large base.
    """
    from personalized_soups.declare.shipped import shipped_recipe

    folder = Path(resolve_base(base))
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else _TINY_BYTES
    return recipe or shipped_recipe("train/tiny.yaml" if num_bytes < _TINY_BYTES else "train/llama-7b.yaml")


def checked_dtype(name: str) -> Dtype:
    """Return the dtype that `--dtype` names.

    Raises:
        UsageError: if the dtype is unknown.
    """
    from personalized_soups.generation.loading import Dtype

    known: tuple[Dtype, ...] = get_args(Dtype)
    for dtype in known:
        if dtype == name:
            return dtype
    raise UsageError(f"unknown dtype {name!r}", where="--dtype", mend=choose_from(name, known))
