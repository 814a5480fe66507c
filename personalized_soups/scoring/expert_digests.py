"""Digests of experts: they change when an expert's reward of an answer may change. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE


def expert_digest(folder: Path) -> str:
    """Return a hex digest of an expert's configuration and tensors. It does not depend on the folder's name.

    Raises:
        InputError: if a file cannot be read.

    Example:
        >>> len(expert_digest(ExpertLibrary.open("experts")["friendly"].folder))
        64
    """
    digests = [digest_file(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return str(blake3("\n".join(["expert 1", *digests]).encode()).hexdigest())
