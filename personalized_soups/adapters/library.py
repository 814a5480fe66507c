"""A library of experts: a folder that contains LoRA adapter folders. An expert has the name of its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.provenance import (
    BaseAdapterRecord,
    BaseRecord,
    ExpertRecord,
    SoupRecord,
    read_expert_record,
    read_soup_record,
)
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, InputError, UsageError, choose_from
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert: a LoRA adapter folder, with or without expert.json. Each file is read when it is first used.

    Attributes:
        name: the expert's name.
        folder: the adapter folder.

    Example:
        >>> expert = ExpertLibrary.open("experts")["friendly"]
        >>> expert.name, len(expert.adapter.modules)
        ('friendly', 4)
    """

    name: str
    folder: Path

    @cached_property
    def adapter(self) -> LoraAdapter:
        """The adapter. The first access opens and checks it, and may raise the errors of `LoraAdapter.open`."""
        return LoraAdapter.open(self.folder)

    @cached_property
    def record(self) -> ExpertRecord | None:
        """The contents of expert.json, or None if the folder has no expert.json."""
        return read_expert_record(self.folder)

    @cached_property
    def soup(self) -> SoupRecord | None:
        """The contents of soup.json, or None if the folder has no soup.json."""
        return read_soup_record(self.folder)

    @property
    def on(self) -> BaseAdapterRecord | None:
        """The adapter on top of which the base model must run with this expert, or None if no record names one.

        A soup that includes this adapter's delta needs no adapter, so its value is None.
        """
        if self.record is not None:
            return self.record.on
        return None if self.soup is None or self.soup.on_folder is not None else self.soup.on

    @property
    def has_record(self) -> bool:
        """Whether expert.json or soup.json says on top of which adapter the expert was trained, if any."""
        return self.record is not None or self.soup is not None

    @property
    def side(self) -> str | None:
        """The side that the expert was trained for, or None if expert.json is missing."""
        return None if self.record is None else self.record.side

    @property
    def dimension(self) -> str | None:
        """The dimension of that side, or None if expert.json is missing or does not say."""
        return None if self.record is None else self.record.dimension

    @property
    def base(self) -> BaseRecord:
        """The base model.

        The name comes from the adapter's configuration or, if it is missing there, from expert.json. The fingerprint
        comes from expert.json.
        """
        recorded = BaseRecord() if self.record is None else self.record.base
        return BaseRecord(name=self.adapter.config.base_model or recorded.name, fingerprint=recorded.fingerprint)


class ExpertLibrary(Mapping[str, Expert]):
    """A mapping from names to experts. An expert's files are read only when the expert is used.

    Example:
        >>> library = ExpertLibrary.open("experts")
        >>> sorted(library)
        ['concise', 'elementary', 'expert', 'friendly', 'informative', 'unfriendly']
    """

    def __init__(self, folders: Mapping[str, Path], *, where: str) -> None:
        self._experts = {name: Expert(name, folder) for name, folder in sorted(folders.items())}
        self.where = where

    @classmethod
    def open(cls, *folders: Path | str) -> Self:
        """Open a library with the experts in one or more folders.

        Args:
            folders: folders that contain experts, or the folders of single experts.

        Raises:
            InputError: if a folder does not exist or contains no expert.
            UsageError: if two experts have the same name.
        """
        experts: dict[str, Path] = {}
        for root in map(Path, folders):
            for folder in _experts_in(root):
                if folder.name in experts and experts[folder.name].resolve() != folder.resolve():
                    raise UsageError(
                        f"two experts have the name {folder.name!r}",
                        where=f"{experts[folder.name]} and {folder}",
                        mend="rename one of the two folders",
                    )
                experts[folder.name] = folder
        return cls(experts, where=", ".join(map(str, folders)))

    def __getitem__(self, name: str) -> Expert:
        return self._experts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)

    def check(self, profile: Profile) -> None:
        """Raise if the profile names an unknown expert.

        Raises:
            DeclarationError: if there are unknown experts. The error names all of them. It gives the place of the first
                one in the profile, and the most similar known name.
        """
        unknown = [name for name in profile.weights if name not in self._experts]
        if not unknown:
            return
        first = unknown[0]
        names = ", ".join(map(repr, unknown))
        # users often give the side that an expert was trained for instead of the name of the expert's folder
        folders = [name for name in self if self._side_or_none(name) == first]
        mend = f"use {folders[0]!r}, the expert for that side" if folders else choose_from(first, self)
        raise DeclarationError(
            f"no expert is called {names} in {self.where}", where=profile.place("weights", first), mend=mend
        )

    def _side_or_none(self, name: str) -> str | None:
        try:
            return self[name].side
        except InputError:
            return None


def is_adapter(folder: Path) -> bool:
    """Return whether a folder contains a file of a LoRA adapter. The file may be damaged."""
    # os.path.isfile returns False where Path.is_file() raises: for folders without permission, such as lost+found
    return any(os.path.isfile(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE))  # noqa: PTH113


def _experts_in(root: Path) -> list[Path]:
    if not os.path.isdir(root):  # noqa: PTH112 # Path.is_dir() raises if the name is too long
        raise InputError("the folder does not exist", where=str(root), mend="give an existing folder of experts")
    if is_adapter(root):
        return [root.resolve()]
    # folders whose names start with a dot are scratch folders of running trainings
    children = [child for child in _children(root) if not child.name.startswith(".") and child.is_dir()]
    experts = [child for child in children if is_adapter(child)]
    if not experts:
        raise InputError(
            f"the folder has no experts: none of its subfolders has {CONFIG_FILE} or {WEIGHTS_FILE}",
            where=str(root),
            mend="give a folder whose subfolders are LoRA adapters, or train an expert: psoups train",
        )
    return experts


def _children(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError as error:
        raise InputError(
            f"the folder cannot be read: {error.strerror}", where=str(root), mend="check its permissions"
        ) from error
