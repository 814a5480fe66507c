"""`python -m personalized_soups`, which is also what torchrun's `-m` starts."""

from __future__ import annotations

from personalized_soups.cli.app import main

if __name__ == "__main__":
    main()
