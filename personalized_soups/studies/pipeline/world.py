"""`World`: what all steps of a run share."""

from __future__ import annotations

from dataclasses import dataclass

from personalized_soups.declare.dimension import Catalogue


@dataclass(frozen=True, slots=True)
class World:
    """What all steps of a run share.

    Attributes:
        base: the base's folder or hub id.
        fingerprint: the base's fingerprint.
        catalogue: the dimensions and sides.
        seed: the random seed.
        device: `auto`, `cpu` or `cuda`.
    """

    base: str
    fingerprint: str
    catalogue: Catalogue
    seed: int
    device: str
