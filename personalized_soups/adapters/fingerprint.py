"""Fingerprints of base models: digests of the tensors that do not depend on folder names or shards."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

from personalized_soups.bases.place import place_of, ways_to_get
from personalized_soups.errors import InputError
from personalized_soups.files.shards import Checkpoint

# Smaller models are hashed completely. Of larger models, three samples of each tensor are hashed, so that the
# fingerprint of a model with 8B parameters takes less than a second.
WHOLE_BELOW_BYTES = 1 << 30
_SAMPLE_BYTES = 16 << 10


def base_fingerprint(base: Path | str) -> str:
    """Return the fingerprint of a base model.

    The fingerprint is the BLAKE3 digest of the sorted list of all tensors, each with its name, dtype, shape and digest.
    A tensor's digest covers all bytes of the tensor if the model is smaller than 1 GiB. In a larger model, the digest
    covers the first, middle and last 16 KiB of the tensor.

    Copies with another folder name, other shards or another configuration have the same fingerprint. Models with other
    dtypes or values have another fingerprint.

    Args:
        base: a model folder, or the hub id of a model in the local cache.

    Raises:
        InputError: if the model does not exist.
        FileFormatError: if the model's weights are not valid safetensors files.
    """
    checkpoint = Checkpoint.open(base_folder(base))
    whole = checkpoint.num_bytes < WHOLE_BELOW_BYTES

    def digest(name: str) -> bytes:
        data = checkpoint.raw(name)
        hasher = blake3()
        if whole or len(data) <= 3 * _SAMPLE_BYTES:
            hasher.update(data)
        else:
            middle = (len(data) - _SAMPLE_BYTES) // 2
            for start in (0, middle, len(data) - _SAMPLE_BYTES):
                hasher.update(data[start : start + _SAMPLE_BYTES])
        return bytes(hasher.digest())

    names = sorted(checkpoint)
    total = blake3(b"personalized_soups base 1\n" if whole else b"personalized_soups base 1 sampled\n")
    with ThreadPoolExecutor(max_workers=2) as pool:
        for name, content in zip(names, pool.map(digest, names), strict=True):
            entry = checkpoint.entry(name)
            total.update(f"{name}\0{entry.dtype}\0{','.join(map(str, entry.shape))}\0".encode())
            total.update(content)
    return str(total.hexdigest())


def base_folder(base: Path | str) -> Path:
    """Return the folder of a base model.

    A named base and a GGUF file are made into a folder; see `place_of`. If `base` is a folder, return its path.
    Otherwise, `base` is a hub id: return the folder of its snapshot in the local cache. Nothing is downloaded.

    Raises:
        InputError: if `base` is neither a folder nor a hub id in the local cache.
        SoupError: all errors of `place_of`.
    """
    base = place_of(base)
    if os.path.isdir(base):  # noqa: PTH112 # Path.is_dir() raises if the name is too long
        return Path(base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(str(base), local_files_only=True, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, FileNotFoundError) as error:
        ways = ways_to_get(str(base))
        raise InputError(
            f"the base model {str(base)!r} is neither a folder nor a hub id in the local cache",
            where=str(base),
            mend=f"{ways or 'check the path'}; or run: hf download {base}",
        ) from error
