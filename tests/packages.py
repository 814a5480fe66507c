"""Installed packages for tests: a module, and the metadata that pip writes for it."""

from __future__ import annotations

from pathlib import Path


def install_package(site: Path, name: str, module: str, entry_points: str = "") -> Path:
    """Install a package of one module into the folder `site`, and return the module's file.

    Args:
        site: a folder for sys.path or PYTHONPATH.
        name: the package's name, and the module's.
        module: the module's source.
        entry_points: the text of entry_points.txt.
    """
    site.mkdir(parents=True, exist_ok=True)
    path = site / f"{name}.py"
    path.write_text(module, encoding="utf-8")
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return path
