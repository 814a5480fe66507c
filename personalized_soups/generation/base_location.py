"""Locate a base model in a folder, in the local cache, or on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from personalized_soups.bases.place import ways_to_get
from personalized_soups.errors import InputError
from personalized_soups.files.file_names import MODEL_CONFIG_FILE
from personalized_soups.files.regular import check_no_lfs_pointers


def find_base(base: str | Path, **place: Any) -> dict[str, Any]:
    """Check that a base exists, and return the options with which from_pretrained loads it.

    The hub gets a single request. transformers would repeat a failed request for half a minute or longer.

    Args:
        base: a folder or a hub id. If a folder has this name, the hub is not asked.
        place: the arguments of from_pretrained that say where to look: cache_dir, local_files_only, revision, token.

    Returns:
        `{"local_files_only": True}` if the hub does not answer but the cache holds the model, else an empty dict.

    Raises:
        InputError: if the folder holds no model, or if neither the cache nor the hub has the model.
    """
    folder = Path(base)
    if os.path.isdir(base):  # noqa: PTH112 # Path.is_dir() raises where the name is too long
        if not (folder / MODEL_CONFIG_FILE).is_file():
            raise InputError(
                f"the folder holds no model: {MODEL_CONFIG_FILE} is missing",
                where=str(base),
                mend="give the folder that holds config.json and the safetensors files",
            )
        check_no_lfs_pointers(folder)
        return {}
    if isinstance(base, Path) or str(base).startswith((".", "/", "~")) or str(base).count("/") > 1:
        raise InputError(
            "there is no such folder", where=str(base), mend="check the path, or give a hub id such as owner/name"
        )
    return _check_hub(base, **place)


def _check_hub(
    base: str,
    *,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache

    # The version of huggingface_hub decides from which package (httpx or another) HTTPError comes.
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        is_cached = isinstance(
            try_to_load_from_cache(base, MODEL_CONFIG_FILE, cache_dir=cache_dir, revision=revision), str
        )
        url = hf_hub_url(base, MODEL_CONFIG_FILE, revision=revision)
    except HFValidationError as fault:
        raise InputError(
            "there is no such folder, and the name is not a hub id",
            where=base,
            mend="check the path, or give a hub id such as owner/name",
        ) from fault
    if local_files_only or is_offline_mode():
        if is_cached:
            return {}
        name = "local_files_only" if local_files_only else "HF_HUB_OFFLINE"
        raise _unreachable(base, url, f"{name} keeps this run from the Hugging Face hub")
    try:
        # Ask the hub once. transformers would repeat the request.
        get_hf_file_metadata(url, token=token, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OSError) as fault:
        refusal = _refusal(base, url, fault)
        if is_cached:
            return {} if refusal else {"local_files_only": True}
        if refusal is None:
            refusal = _unreachable(base, url, f"the Hugging Face hub can't be reached: {first_line(fault)}")
        raise refusal from fault
    return {}


def _refusal(base: str, url: str, fault: Exception) -> InputError | None:
    """Return the error to raise if the hub refuses the model, or None if the hub gave no usable answer."""
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    mend = "check the path, or the hub id (owner/name)"
    if isinstance(fault, GatedRepoError):
        what = "the hub gives this model only to accounts that have accepted its conditions"
        mend = f"give a model folder; or accept the conditions at {_page(base, url)}, then run: hf auth login"
    elif isinstance(fault, RepositoryNotFoundError):
        what = "there is no such folder, and the hub has no model of this name that you may read"
        mend = f"{mend}; for a private model run: hf auth login"
    elif isinstance(fault, EntryNotFoundError):
        what = f"there is no such folder, and the hub's repository of this name has no {MODEL_CONFIG_FILE}"
    elif isinstance(fault, HfHubHTTPError) and fault.response.status_code < 500:
        what = f"there is no such folder, and the hub refuses the model: {first_line(fault)}"
    else:
        return None
    return InputError(what, where=base, mend=mend)


def _unreachable(base: str, url: str, reason: str) -> InputError:
    ways = ways_to_get(base)
    return InputError(
        f"{'the base is not installed' if ways else 'there is no such folder'}, the local cache has no such model, "
        f"and {reason}",
        where=base,
        mend=f"{ways or 'give a model folder (config.json, safetensors, tokenizer)'}; or run on a machine that can "
        f"reach {_page(base, url)}; or download the model on such a machine and copy the folder: hf download {base}",
    )


def _page(base: str, url: str) -> str:
    return f"{url.partition(f'/{base}/')[0]}/{base}"


def first_line(fault: Exception) -> str:
    """Return the first two lines of an error joined to one line, or the name of its type if it has no text."""
    lines = str(fault).strip().splitlines()
    return " ".join(line.strip() for line in lines[:2])[:200] if lines else type(fault).__name__
