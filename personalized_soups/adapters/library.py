"""A library of experts: a folder whose children are LoRA adapter folders, each named by its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.provenance import BaseRecord, ExpertRecord, read_expert_record
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError, InputError, UsageError, choose_from
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert: an adapter folder, and expert.json where it has one. Opened, not read."""

    name: str
    folder: Path

    @cached_property
    def adapter(self) -> LoraAdapter:
        """The adapter, with header and configuration checked; raises what LoraAdapter.open raises."""
        return LoraAdapter.open(self.folder)

    @cached_property
    def record(self) -> ExpertRecord | None:
        """What expert.json says, or None."""
        return read_expert_record(self.folder)

    @property
    def side(self) -> str | None:
        """The side that it was trained for, where expert.json says so."""
        return None if self.record is None else self.record.side

    @property
    def dimension(self) -> str | None:
        """That side's dimension, where expert.json says so."""
        return None if self.record is None else self.record.dimension

    @property
    def base(self) -> BaseRecord:
        """The base model: its name by the adapter's configuration, its fingerprint by expert.json."""
        recorded = BaseRecord() if self.record is None else self.record.base
        return BaseRecord(name=self.adapter.config.base_model or recorded.name, fingerprint=recorded.fingerprint)


class ExpertLibrary(Mapping[str, Expert]):
    """Experts by name. Only headers are read, and those only of the experts that are asked for."""

    def __init__(self, folders: Mapping[str, Path], *, where: str) -> None:
        self._experts = {name: Expert(name, folder) for name, folder in sorted(folders.items())}
        self.where = where

    @classmethod
    def open(cls, *folders: Path | str) -> Self:
        """List the experts in one or several folders, each a folder of experts or an expert itself.

        Raises:
            InputError: if a folder is missing or holds no expert.
            UsageError: if two experts have one name.
        """
        found: dict[str, Path] = {}
        for root in map(Path, folders):
            for folder in _experts_in(root):
                if folder.name in found and found[folder.name].resolve() != folder.resolve():
                    raise UsageError(
                        f"two experts are called {folder.name!r}",
                        where=f"{found[folder.name]} and {folder}",
                        mend="rename one of the folders",
                    )
                found[folder.name] = folder
        return cls(found, where=", ".join(map(str, folders)))

    def __getitem__(self, name: str) -> Expert:
        return self._experts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)

    def check(self, profile: Profile) -> None:
        """Raise if the profile names an expert that is not here.

        Raises:
            DeclarationError: naming every unknown expert, the place of the first, and the nearest known name.
        """
        unknown = [name for name in profile.weights if name not in self._experts]
        if not unknown:
            return
        first = unknown[0]
        names = ", ".join(map(repr, unknown))
        # people remember the side that they trained; the folder may be called otherwise
        folders = [name for name in self if self._side_or_none(name) == first]
        mend = f"the expert for that side is called {folders[0]!r}" if folders else choose_from(first, self)
        raise DeclarationError(
            f"no expert is called {names} in {self.where}", where=profile.place("weights", first), mend=mend
        )

    def _side_or_none(self, name: str) -> str | None:
        try:
            return self[name].side
        except InputError:
            return None


def is_adapter(folder: Path) -> bool:
    """Return whether a folder looks like a LoRA adapter, sound or not."""
    # os.path says no where Path.is_file() raises: a folder that may not be entered, such as lost+found
    return any(os.path.isfile(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE))  # noqa: PTH113


def _experts_in(root: Path) -> list[Path]:
    if not os.path.isdir(root):  # noqa: PTH112 # Path.is_dir() raises where the name is too long
        raise InputError("there is no such folder", where=str(root), mend="give a folder of experts")
    if is_adapter(root):
        return [root.resolve()]
    # names that begin with a dot are scratch folders of a run that is going on
    children = [child for child in _children(root) if not child.name.startswith(".") and child.is_dir()]
    experts = [child for child in children if is_adapter(child)]
    if not experts:
        raise InputError(
            f"no folder in it holds {CONFIG_FILE}",
            where=str(root),
            mend="give a folder whose children are LoRA adapter folders, or train an expert: psoups train",
        )
    return experts


def _children(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except OSError as error:
        raise InputError(
            f"the folder cannot be read: {error.strerror}", where=str(root), mend="check its permissions"
        ) from error
