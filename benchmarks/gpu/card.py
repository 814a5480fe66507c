"""Whether this machine has what a GPU run needs."""

from __future__ import annotations

import sys


def missing_card() -> str | None:
    """Return the error message for a machine on which nothing can run; None if PyTorch finds a GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        return (
            f"error: PyTorch is not installed\n   at: {sys.executable}\n"
            " mend: make gpu PYTHON=... with an interpreter that has torch, transformers and peft"
        )
    if torch.cuda.is_available():
        return None
    return (
        f"error: PyTorch {torch.__version__} finds no CUDA device\n   at: {sys.executable}\n"
        " mend: run `make gpu` on a machine with an NVIDIA GPU and a CUDA build of PyTorch"
    )
