"""Run the command line with `python -m personalized_soups`, or with `torchrun -m personalized_soups`."""

from __future__ import annotations

from personalized_soups.cli.app import main

if __name__ == "__main__":
    main()
