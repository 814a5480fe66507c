"""Reject pickle files by the suffix of their name, because loading a pickle can run any code."""

from __future__ import annotations

from pathlib import Path

from personalized_soups.errors import FileFormatError

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


def check_no_pickle(path: Path) -> None:
    """Raise an error if `path` has the suffix of a pickle file, such as `.bin` or `.pt`.

    Raises:
        FileFormatError: if it has. The message contains a command that converts the file to safetensors.
    """
    if path.suffix.lower() in PICKLES:
        converted = path.with_name(path.stem.replace("pytorch_model", "model") + ".safetensors")
        raise FileFormatError(
            f"{path.name} is a pickle; it was not opened, because loading a pickle can run any code",
            where=str(path),
            mend='convert the file if you trust its source: python -c "import sys, torch, safetensors.torch as s; '
            "s.save_file({k: v.clone().contiguous() for k, v in torch.load(sys.argv[1], weights_only=True).items()}, "
            f"sys.argv[2])\" '{path}' '{converted}'",
        )
