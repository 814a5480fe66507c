"""Resolve the values of `--base` and `--dtype`, and choose the shipped catalogue and recipe for a base."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from personalized_soups.cli import render
from personalized_soups.errors import UsageError, choose_from

if TYPE_CHECKING:
    from personalized_soups.generation.loading import Dtype

# The name of the base that needs no installation, no cache and no network.
EMBEDDED = "tiny"

# The catalogue of a base without a name.
_CATALOGUE = "dimensions/psoups.yaml"
_MEGABYTE = 1_000_000

# If no recipe is given, a base without a name and with fewer bytes of weights is trained as the tiny base.
_TINY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a base model is loaded.

    Attributes:
        base: the value of --base: a name of the table of named bases, a folder, a GGUF file, or a model id.
        device: `auto`, `cpu` or `cuda`.
        dtype: the dtype of the loaded model.
        same_base: treat base models with different names or fingerprints as the same base.
        on: folder of the adapter that is added to the base's weights, or None.
    """

    base: str
    device: str
    dtype: Dtype
    same_base: bool = False
    on: Path | None = None

    @property
    def path(self) -> str:
        """The base's folder or model id."""
        return resolve_base(self.base)

    @property
    def fingerprint(self) -> str:
        """A text that identifies the base and the adapter that is added to it. A resumed run must have the same."""
        from personalized_soups.adapters.base_adapter import BaseAdapter
        from personalized_soups.adapters.fingerprint import base_fingerprint

        base = base_fingerprint(self.path)
        return base if self.on is None else f"{base} on {BaseAdapter.open(self.on).digest}"


def resolve_base(base: str) -> str:
    """Return the folder of a named base or a GGUF file, else return `base` unchanged.

    A folder that is not in the cache is made now, and a progress bar is shown meanwhile. A user who has a folder with
    the name of a named base writes `./tiny`.

    Raises:
        SoupError: if a GGUF file, or the file of an installed package, is damaged or not supported.
    """
    from personalized_soups.bases.place import place_of

    with ExitStack() as stack:
        bar: render.Bar | None = None

        def on_progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                title = f"converting {Path(base).name} (MB)"
                bar = stack.enter_context(render.progress(title, -(-total // _MEGABYTE)))
            bar.update(-(-done // _MEGABYTE))

        return str(place_of(base, on_progress))


def catalogue_of(base: str, dimensions: Path | None) -> Path:
    """Return `dimensions` if it is given, else the path of the shipped catalogue that suits the base."""
    from personalized_soups.declare.base_table import named_bases
    from personalized_soups.declare.shipped import shipped_recipe

    if dimensions is not None:
        return dimensions
    row = named_bases().get(base)
    return shipped_recipe(_CATALOGUE if row is None else row.dimensions)


def recipe_of(base: str, recipe: Path | None, *, prefix: str = "") -> Path:
    """Return `recipe` if it is given, else the path of the shipped training recipe that suits the base.

    A named base has its own recipe. Another base has a recipe for its size. A model id counts as a large base, because
    its size is not known. `prefix` is that of the shipped recipes of another kind, such as `reward-`.
    """
    from personalized_soups.declare.base_table import named_bases
    from personalized_soups.declare.shipped import shipped_recipe

    if recipe is not None:
        return recipe
    if (row := named_bases().get(base)) is not None:
        named = Path(row.train)
        return shipped_recipe(str(named.with_name(f"{prefix}{named.name}")))
    folder = Path(resolve_base(base))
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else _TINY_BYTES
    return shipped_recipe(f"train/{prefix}{'tiny' if num_bytes < _TINY_BYTES else 'llama-7b'}.yaml")


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
