"""A base adapter: a plain LoRA adapter, such as an SFT adapter, on top of which experts are trained.

The base of such experts is the base model plus this adapter's delta, with weight 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from blake3 import blake3

from personalized_soups.adapters.compatible import is_same_base
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.provenance import BaseAdapterRecord, BaseRecord
from personalized_soups.errors import IncompatibleExpertsError, UnsupportedAdapterError

_MERGE_FIRST = "merge this adapter into the base first, and give the merged model as the base"


@dataclass(frozen=True, eq=False)
class BaseAdapter:
    """An opened base adapter.

    Attributes:
        folder: the adapter's folder.
        same_base: accept every base, whatever fingerprint the adapter's folder records.

    Example:
        >>> sft = BaseAdapter.open("experts/informative")
        >>> sft.name, len(sft.digest)
        ('informative', 64)
    """

    folder: Path
    same_base: bool = False

    @classmethod
    def open(cls, folder: Path | str, *, same_base: bool = False) -> Self:
        """Open an adapter folder and check that the adapter can be a part of the base.

        An expert and a soup are adapters too, so they are accepted, unless they need an adapter themselves.

        Args:
            folder: the folder. It may hold any LoRA adapter that consists of low-rank factors alone.
            same_base: let `check_base` accept every base.

        Raises:
            UnsupportedAdapterError: if the adapter has more than low-rank factors. The error names the setting.
            IncompatibleExpertsError: if the adapter was trained on top of an adapter itself.
            InputError, FileFormatError: in the same cases as `LoraAdapter.open`.
        """
        opened = cls(Path(folder), same_base)
        opened._check_plain()
        if opened.expert.on is not None:
            raise IncompatibleExpertsError(
                f"the adapter was itself trained on top of an adapter, {opened.expert.on.name}",
                where=str(folder),
                mend=f"merge both into one adapter first: merge {opened.name} with weight 1 on top of "
                f"{opened.expert.on.name}, and give the merged adapter",
            )
        return opened

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @cached_property
    def expert(self) -> Expert:
        """The adapter as an expert: its records say how it was trained."""
        return Expert(self.name, self.folder)

    @property
    def adapter(self) -> LoraAdapter:
        """The adapter's configuration and tensors."""
        return self.expert.adapter

    @cached_property
    def digest(self) -> str:
        """The BLAKE3 digest of the adapter's delta, in hex.

        The digest covers the name, kind and scaling of each module, and the dtypes, shapes and bytes of A and B. It
        does not cover the folder's name, the order of the file, or settings that do not change the delta.
        """
        total = blake3(b"personalized_soups base adapter 1\n")
        for name, module in sorted(self.adapter.modules.items()):
            total.update(f"{name}\0{module.kind}\0{module.scaling!r}\0".encode())
            for entry, data in (self.adapter.a_bytes(name), self.adapter.b_bytes(name)):
                total.update(f"{entry.dtype}\0{','.join(map(str, entry.shape))}\0".encode())
                total.update(data)
        return str(total.hexdigest())

    @property
    def record(self) -> BaseAdapterRecord:
        """The name and the digest, which the records of experts and soups store."""
        return BaseAdapterRecord(name=self.name, digest=self.digest)

    def check_base(self, base: Path | str) -> None:
        """Check that expert.json or soup.json does not record another base.

        Args:
            base: a model folder, or the hub id of a model in the local cache.

        Raises:
            IncompatibleExpertsError: if it does.
        """
        source = self.expert.record or self.expert.soup
        if self.same_base or source is None or source.base.fingerprint is None:
            return
        actual = base_fingerprint(base)
        if not is_same_base(source.base, BaseRecord(fingerprint=actual)):
            raise IncompatibleExpertsError(
                f"the adapter was trained on {source.base.name or 'another base'} (fingerprint "
                f"{source.base.fingerprint[:12]}), but this base has the fingerprint {actual[:12]}",
                where=str(self.folder),
                mend="give the base that the adapter was trained on",
            )

    def _check_plain(self) -> None:
        trained = next(iter(self.adapter.trained.values()), None)
        if trained is not None:
            raise UnsupportedAdapterError(
                f"the adapter has more than low-rank factors: the tensor {trained.name} ({trained.origin})",
                where=str(self.folder),
                mend=_MERGE_FIRST,
            )
        if self.adapter.config.ensure_weight_tying:
            raise UnsupportedAdapterError(
                "the adapter was trained with ensure_weight_tying, so one delta is stored twice",
                where=str(self.folder),
                mend=_MERGE_FIRST,
            )


def open_on(on: Path | str | None, *, same_base: bool = False) -> BaseAdapter | None:
    """Return the base adapter in the folder `on`, or None if `on` is None. Arguments and errors as in `open`."""
    return None if on is None else BaseAdapter.open(on, same_base=same_base)
