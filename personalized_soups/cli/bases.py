"""What `--base` and `--seed` mean on the command line, and the shipped files that go with a base."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "tiny"

# NumPy's and so transformers' seeds have 32 bits.
MAX_SEED = 2**32 - 1

# A base of fewer bytes than this is trained by the recipe for the tiny base where none is named.
_TINY_BYTES = 64 << 20


def resolve_base(base: str) -> str:
    """Return the folder or hub id that is meant; `tiny` is the embedded base (a folder of that name is `./tiny`)."""
    if base != EMBEDDED:
        return base
    from personalized_soups.tiny import BASE_FOLDER

    return str(BASE_FOLDER)


def catalogue_of(base: str, dimensions: Path | None) -> Path:
    """Return the catalogue's file: the one given, else the shipped one; the embedded base has its own scorers."""
    from personalized_soups.declare.shipped import shipped_recipe

    return dimensions or shipped_recipe(f"dimensions/{'tiny' if base == EMBEDDED else 'psoups'}.yaml")


def recipe_of(base: str, recipe: Path | None) -> Path:
    """Return the training recipe's file: the one given, else the shipped one that suits the base's size.

    A hub id is taken for a large base.
    """
    from personalized_soups.declare.shipped import shipped_recipe

    folder = Path(resolve_base(base))
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else _TINY_BYTES
    return recipe or shipped_recipe("train/tiny.yaml" if num_bytes < _TINY_BYTES else "train/llama-7b.yaml")
