"""`Basis`: learned base rewards of items, in memory and in a folder.

Shapes: N = items, F = features of an item, J = base rewards, U = users.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from blake3 import blake3
from pydantic import Field

from personalized_soups.declare.declared import Declared
from personalized_soups.declare.record import read_record
from personalized_soups.errors import FileFormatError, IncompatibleExpertsError
from personalized_soups.files.atomic import new_folder
from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import BASIS_FILE, BASIS_WEIGHTS_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.writer import spec_of, write_safetensors
from personalized_soups.scoring.item_features import ItemFeatures
from personalized_soups.systems.lore.model import LoreModel
from personalized_soups.systems.pref.model import PrefModel
from personalized_soups.systems.preference_models import Floats
from personalized_soups.users.answers.prior import GaussianPrior

Item = TypeVar("Item")

Kind = Literal["pref", "lore"]

_MAX_RECORD_BYTES = 16 << 20


class BasisRecord(Declared):
    """The file `basis.json`. It holds no text and no name of a user."""

    format: Literal["personalized_soups basis 1"] = "personalized_soups basis 1"
    kind: Kind = Field(description="pref: free weights. lore: weights that are at least 0 and sum to 1.")
    names: tuple[str, ...] = Field(description="The name of each base reward.")
    num_users: int = Field(description="The number of users from whom the basis was learned.")
    num_comparisons: int = Field(description="The number of their comparisons.")
    features_digest: str = Field(description="The digest of the features that the base rewards are linear in.")
    features: dict[str, Any] = Field(description="How the features are made, such as the base and the pooling.")
    digest: str = Field(description="The digest of the features and of the tensors.")
    blake3: str = Field(description="The BLAKE3 digest of basis.safetensors.")
    files: tuple[str, ...] = Field(description="All files of the folder.")


@dataclass(frozen=True, eq=False)
class Basis(Generic[Item]):
    """Learned base rewards of items. It implements `BaseRewards`: a user's reward is `w . features(item)`.

    Attributes:
        model: the base rewards and the weights of known users.
        items: makes the features of items that the base rewards are linear in.
        about: how the features are made, for the record.
        num_comparisons: the number of comparisons from which the basis was learned.
    """

    model: PrefModel | LoreModel
    items: ItemFeatures[Item]
    about: Mapping[str, Any] = field(default_factory=dict)
    num_comparisons: int = 0

    @property
    def kind(self) -> Kind:
        """`pref` or `lore`."""
        return "lore" if isinstance(self.model, LoreModel) else "pref"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the base rewards: `reward-1`, `reward-2`, and so on."""
        return tuple(f"reward-{number}" for number in range(1, self.model.vectors.shape[1] + 1))

    @property
    def prior(self) -> GaussianPrior:
        """The distribution of the known users' weights: the prior of a new user's weights."""
        return self.model.prior

    @cached_property
    def digest(self) -> str:
        """A hex digest that changes when the base rewards of an item may change."""
        return _digest(self.items.digest, self.kind, self.model.vectors)

    def features(self, items: Sequence[Item], /) -> Floats:
        """Return [N, J], float64: the base rewards of each item."""
        result: Floats = self.items.features(items) @ self.model.vectors
        return result

    def save(self, folder: Path | str, *, overwrite: bool = False) -> BasisRecord:
        """Write the basis to a new folder, all or nothing: `basis.json` and `basis.safetensors`. Return the record.

        Args:
            folder: the output folder.
            overwrite: replace a folder that this package wrote.

        Raises:
            OutputExistsError: if the folder exists and may not be replaced.
            RunError: if the disk is full.
        """
        prior = self.prior
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(array))
            for name, array in (
                ("vectors", self.model.vectors),
                ("users", self.model.users),
                ("prior_mean", prior.mean),
                ("prior_covariance", prior.covariance),
            )
        }
        with new_folder(folder, overwrite) as scratch:
            specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
            write_safetensors(scratch / BASIS_WEIGHTS_FILE, specs, tensors.items())
            record = BasisRecord(
                kind=self.kind,
                names=self.names,
                num_users=len(self.model.users),
                num_comparisons=self.num_comparisons,
                features_digest=self.items.digest,
                features=dict(self.about),
                digest=self.digest,
                blake3=digest_file(scratch / BASIS_WEIGHTS_FILE),
                files=(BASIS_FILE, BASIS_WEIGHTS_FILE),
            )
            text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False)
            (scratch / BASIS_FILE).write_text(text + "\n", encoding="utf-8")
        return record

    @classmethod
    def open(cls, folder: Path | str, items: ItemFeatures[Item]) -> Basis[Item]:
        """Read a folder that `save` wrote.

        Args:
            folder: the folder.
            items: makes the features of items. It must be the same as when the basis was learned.

        Raises:
            FileFormatError: if a file is missing or damaged.
            IncompatibleExpertsError: if the features differ from those that the basis was learned with.
        """
        record = read_basis_record(folder)
        if record.features_digest != items.digest:
            made = ", ".join(f"{name} {value}" for name, value in record.features.items())
            raise IncompatibleExpertsError(
                f"the basis was learned with other features ({made or 'of another kind'})",
                where=str(folder),
                mend="give the base, the dtype and the pooling that the basis was learned with, or learn a new basis",
            )
        return cls(_read_model(Path(folder), record), items, record.features, record.num_comparisons)


def read_basis_record(folder: Path | str) -> BasisRecord:
    """Return the record of a basis.

    Raises:
        FileFormatError: if the folder holds no basis, or the record is damaged.
        InputError: if the file cannot be read.
    """
    path = Path(folder) / BASIS_FILE
    if not path.is_file():
        raise FileFormatError(
            f"the folder holds no basis: {BASIS_FILE} is missing",
            where=str(folder),
            mend="give a folder that psoups basis train wrote",
        )
    mend = "learn the basis again with psoups basis train"
    return read_record(BasisRecord, path, what="basis", max_bytes=_MAX_RECORD_BYTES, mend=mend)


def _read_model(folder: Path, record: BasisRecord) -> PrefModel | LoreModel:
    path = folder / BASIS_WEIGHTS_FILE
    if not path.is_file() or digest_file(path) != record.blake3:
        raise FileFormatError(
            f"the file is missing, or it is not the one that {BASIS_FILE} describes",
            where=str(path),
            mend="copy the whole folder again, or learn the basis again with psoups basis train",
        )
    file = SafetensorsFile.open(path)
    vectors, users, mean, covariance = (
        file.tensor(name).numpy().copy() for name in ("vectors", "users", "prior_mean", "prior_covariance")
    )
    if record.kind == "lore":
        return LoreModel(vectors, users)
    return PrefModel(vectors, users, GaussianPrior(mean, covariance))


def _digest(features_digest: str, kind: str, vectors_FJ: Floats) -> str:
    head = json.dumps(["basis 1", features_digest, kind, list(vectors_FJ.shape)]).encode()
    return str(blake3(head + np.ascontiguousarray(vectors_FJ).tobytes()).hexdigest())
