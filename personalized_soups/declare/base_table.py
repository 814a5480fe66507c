"""The table of named bases: what `base="smollm2"` means, and which shipped recipes suit it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Self

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe

# A name with a dot or a slash would look like a path or a hub id.
BaseName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
RelativePath = Annotated[str, Field(pattern=r"^[^/\\.][^\\]*$")]
_TABLE = "bases.yaml"


class PackagedGguf(Declared):
    """A GGUF file in a package of the Python Package Index."""

    package: str = Field(description="The package's name for pip.")
    version: str = Field(description="The version that has the file.")
    file: RelativePath = Field(description="The file, relative to the folder in which the package is installed.")
    num_bytes: int = Field(gt=0, description="The size of the file.")
    blake3: str = Field(pattern="^[0-9a-f]{64}$", description="The BLAKE3 digest of the file, in hex.")

    @property
    def requirement(self) -> str:
        """The argument of pip install."""
        return f"{self.package}=={self.version}"


class NamedBase(Declared):
    """One named base. It is a folder of this package, or a GGUF file of another package or a hub id, or both."""

    folder: RelativePath | None = Field(default=None, description="A model folder, relative to this package.")
    gguf: PackagedGguf | None = Field(default=None, description="Where the model is installed from.")
    hub: str | None = Field(default=None, description="The Hugging Face id, used if the package is not installed.")
    licence: str = Field(description="The licence of the model, as an SPDX identifier.")
    dimensions: RelativePath = Field(description="The shipped catalogue that suits the base.")
    train: RelativePath = Field(description="The shipped training recipe that suits the base.")
    study: RelativePath | None = Field(default=None, description="The shipped recipe of `psoups quickstart`.")
    full_study: RelativePath | None = Field(
        default=None, description="The recipe of the full study, which takes hours."
    )
    prompts: RelativePath | None = Field(
        default=None,
        description="The shipped prompts of the study. Left out, the prompts are those of the embedded base's world.",
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if self.folder is None and self.gguf is None and self.hub is None:
            raise refusal("the base has no source", mend="write `folder`, `gguf` or `hub`")
        if self.folder is not None and (self.gguf is not None or self.hub is not None):
            raise refusal("a base in a folder has no other source", mend="remove `folder`, or `gguf` and `hub`")
        return self


class BaseTable(Declared):
    """The named bases.

    Example:
        >>> named_bases()["tiny"].train
        'train/tiny.yaml'
    """

    bases: dict[BaseName, NamedBase] = Field(min_length=1, description="The bases by name.")


@cache
def named_bases() -> Mapping[str, NamedBase]:
    """Return the bases of the shipped table by name."""
    return load(shipped_recipe(_TABLE), BaseTable).bases


def named_by_hub_id(hub: str) -> tuple[str, NamedBase] | None:
    """Return the name and the row of the named base with a Hugging Face id, or None if there is none."""
    return next(((name, base) for name, base in named_bases().items() if base.hub == hub), None)
