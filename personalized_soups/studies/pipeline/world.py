"""`World`: what all steps of a run share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from personalized_soups.declare.dimension import Catalogue

if TYPE_CHECKING:
    from personalized_soups.generation.generator import Generator
    from personalized_soups.mixing.model import SoupModel


@dataclass(frozen=True, slots=True)
class World:
    """What all steps of a run share.

    Attributes:
        base: the base's folder or hub id.
        fingerprint: the base's fingerprint.
        catalogue: the dimensions and sides.
        seed: the random seed.
        device: `auto`, `cpu` or `cuda`.
        dtype: the dtype of the base while it answers.
        on: the folder of the adapter on top of which everything is trained and answers, or None.
    """

    base: str
    fingerprint: str
    catalogue: Catalogue
    seed: int
    device: str
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    on: Path | None = None

    @property
    def answer_seed(self) -> int:
        """The seed of test answers. All systems and sweeps answer a prompt with the same random numbers."""
        return 3000 + self.seed

    def soup_model(self, experts: Sequence[Path]) -> SoupModel:
        """Return the base with the experts of some folders."""
        from personalized_soups.mixing.model import SoupModel

        return SoupModel.from_pretrained(self.base, list(experts), on=self.on, device=self.device, dtype=self.dtype)

    def generator(self) -> Generator:
        """Return the base alone, with the adapter on top of it."""
        from personalized_soups.generation.generator import Generator

        return Generator.open(self.base, on=self.on, device=self.device, dtype=self.dtype)
