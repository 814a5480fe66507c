"""A trained user model: which soft tokens each user has. It lies in the folder of the adapter that was trained with it.

`user_model.json` names the users, and `user_model.safetensors` holds the tables (`UserTables`).

Shapes: T = soft tokens of one user, H = width of the base's embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from personalized_soups.adapters.provenance import BaseRecord
from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.training import PositiveInt, UserModelKind
from personalized_soups.errors import FileFormatError, IncompatibleExpertsError, InputError
from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.strict_json import parse_json
from personalized_soups.files.writer import spec_of, write_safetensors
from personalized_soups.generation.loading import check_adapter_folder
from personalized_soups.generation.soft_tokens import embedding_width
from personalized_soups.mixing.personal_model import PersonalModel
from personalized_soups.systems.p_rlhf.user_tables import UserTables, table_shapes

RECORD_FILE = "user_model.json"
TABLES_FILE = "user_model.safetensors"

_MEND = "restore the folder from a backup, or train the user model again"


class UserModelRecord(Declared):
    """user_model.json: the users of a user model, and the sizes of its tables."""

    format_version: Literal[1] = 1
    kind: UserModelKind
    num_tokens: PositiveInt = Field(description="The number of soft tokens of each user.")
    num_clusters: PositiveInt | None = Field(default=None, description="The number of clusters, for `cluster`.")
    width: PositiveInt = Field(description="The width of the base's embeddings.")
    users: tuple[Annotated[str, Field(pattern=r"\S")], ...] = Field(
        description="The ids of the known users, in the order of the tables' rows."
    )
    base: BaseRecord = Field(default_factory=BaseRecord)
    blake3: str = Field(description="BLAKE3 digest of user_model.safetensors, in hex.")

    @model_validator(mode="after")
    def _check_users(self) -> Self:
        seen: set[str] = set()
        for place, user in enumerate(self.users):
            if user in seen:
                raise refusal(f"the user {user!r} is named twice", mend=_MEND, key=("users", place))
            seen.add(user)
        if (self.kind == "cluster") != (self.num_clusters is not None):
            raise refusal("`num_clusters` is for the kind `cluster`, and only for it", mend=_MEND)
        return self

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each table, by its name."""
        return table_shapes(
            self.kind,
            num_users=len(self.users),
            num_tokens=self.num_tokens,
            num_clusters=self.num_clusters or 0,
            width=self.width,
        )


@dataclass(frozen=True, eq=False)
class UserModel:
    """The soft tokens of users, and the adapter that was trained with them.

    Attributes:
        folder: the folder of the adapter and the user model.
        record: the contents of user_model.json.
        tables: the tables, on the CPU.

    Example:
        >>> users = UserModel.open("user-model")  # doctest: +SKIP
        >>> users.soft_tokens("ada").shape  # doctest: +SKIP
        torch.Size([10, 128])
    """

    folder: Path
    record: UserModelRecord
    tables: UserTables = field(repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open and check a folder that `train_user_model` has written.

        Raises:
            FileFormatError: if the folder holds no adapter or no user model, or if one of the files is damaged or is
                not the file that the record names.
            InputError: if a file cannot be read, or a value of a table is NaN or infinite.
        """
        folder = Path(folder)
        check_adapter_folder(folder)
        record = _read_record(folder / RECORD_FILE)
        path = folder / TABLES_FILE
        file = SafetensorsFile.open(path)
        found = {name: tuple(entry.shape) for name, entry in file.entries.items()}
        if found != dict(record.shapes):
            raise FileFormatError(
                f"the tables have the shapes {_shown(found)}, but {RECORD_FILE} asks for {_shown(record.shapes)}",
                where=str(path),
                mend=_MEND,
            )
        if digest_file(path) != record.blake3:
            raise FileFormatError(
                f"the file is not the one for which {RECORD_FILE} was written: its digest differs",
                where=str(path),
                mend=_MEND,
            )
        tables = {name: file.tensor(name) for name in file.entries}
        for name, table in tables.items():
            if not table.is_floating_point() or not bool(torch.isfinite(table).all()):
                raise InputError(
                    f"the table {name} has a value that is not a finite number", where=str(path), mend=_MEND
                )
        return cls(folder, record, UserTables(record.kind, tables).requires_grad_(False))

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {user: number for number, user in enumerate(self.record.users, start=1)}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide the answers: those of the adapter and of the user model."""
        return tuple(self.folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, TABLES_FILE))

    @property
    def users(self) -> Collection[str]:
        """The ids of the known users."""
        return self.record.users

    def soft_tokens(self, user: str | None = None) -> Tensor:
        """Return the soft tokens [T, H] of a user, float32 on the CPU. An unknown user has the generic user's."""
        number = 0 if user is None else self._numbers.get(user, 0)
        with torch.no_grad():
            tokens_1TH: Tensor = self.tables(torch.tensor([number]))
        return tokens_1TH[0]

    def personal_model(self, user: str | None = None, **parts: Any) -> PersonalModel:
        """Return the personal model of a user: the adapter and the user's soft tokens.

        Args:
            user: the user's id. An unknown user is answered as the generic user.
            parts: further parts of the personal model, such as `profile` or `text`.
        """
        return PersonalModel(adapter=self.folder, soft_tokens=self.soft_tokens(user), **parts)

    def check_base(self, model: Any) -> None:
        """Raise IncompatibleExpertsError if a model's embeddings do not have the width of the soft tokens."""
        width = embedding_width(model)
        if width != self.record.width:
            raise IncompatibleExpertsError(
                f"the soft tokens have the width {self.record.width}, but the base's embeddings have the width {width}",
                where=str(self.folder),
                mend=f"give the base that the user model was trained on: {self.record.base.name or 'another base'}",
            )


def write_user_model(folder: Path, tables: UserTables, *, users: Collection[str], base: BaseRecord) -> None:
    """Write user_model.safetensors and user_model.json into the folder of the adapter.

    Raises:
        OSError: if writing fails.
    """
    values = {name: table.detach().cpu().contiguous() for name, table in sorted(tables.named_parameters())}
    path = folder / TABLES_FILE
    write_safetensors(path, [spec_of(name, table) for name, table in values.items()], values.items())
    sizes = values["centers"].shape if tables.kind == "cluster" else (None, *values["generic"].shape)
    record = UserModelRecord(
        kind=tables.kind,
        num_clusters=sizes[0],
        num_tokens=int(sizes[1]),
        width=int(sizes[2]),
        users=() if tables.kind == "uninformative" else tuple(users),
        base=base,
        blake3=digest_file(path),
    )
    text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")


def _read_record(path: Path) -> UserModelRecord:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FileFormatError(
            f"the folder holds no user model: {RECORD_FILE} is missing",
            where=str(path.parent),
            mend="give the folder of a user model, which the training method p-dpo writes",
        ) from None
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check its permissions"
        ) from error
    parse_json(data, path)  # raises for repeated keys and for text that is not JSON
    try:
        return UserModelRecord.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(
            f"the record is invalid: {first['msg']}", where=f"{path}: {key}" if key else str(path), mend=_MEND
        ) from None


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
