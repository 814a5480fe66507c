"""`make docs` builds the site without a warning, and no page of it loads anything from another machine."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

# Elements that a browser loads by itself, with the attributes that name what it loads. Links (`a href`) load nothing.
_LOADED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "link": ("href",),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "object": ("data",),
    "video": ("src", "poster"),
}


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for name, value in attrs if name in _LOADED.get(tag, ()) and value]


def foreign(html: str) -> list[str]:
    """Return the addresses on other machines that a page loads."""
    parser = _Loads()
    parser.feed(html)
    return [address for address in parser.addresses if re.match(r"(?:https?:)?//", address)]


def test_an_address_elsewhere_is_found() -> None:
    assert foreign('<script src="https://cdn.example/x.js"></script>') == ["https://cdn.example/x.js"]
    assert foreign('<link rel="stylesheet" href="//fonts.example/a.css"><a href="https://arxiv.org">') == [
        "//fonts.example/a.css"
    ]
    assert foreign('<script src="_static/x.js"></script>') == []


def test_every_page_is_part_of_the_site() -> None:
    pages = {
        path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md") if "_build" not in path.parts
    }
    listed = {"index"}
    for index in ("index.md", "howto/index.md", "reference/index.md", "explanation/index.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / index).read_text(encoding="utf-8"), re.DOTALL):
            folder = Path(index).parent
            listed |= {(folder / line).as_posix() for line in tree.splitlines() if line and not line.startswith(":")}
    assert listed == pages


def test_the_reference_has_every_public_name() -> None:
    import personalized_soups

    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in personalized_soups.__all__ if not re.search(rf"(?::: |`){name}\b", page)]
    assert missing == ["__version__"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    for package in ("furo", "myst_parser"):
        import_module(package)  # an extra: where a package is missing, the test is skipped

    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, str(DOCS), str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    assert {page.name: found for page in pages if (found := foreign(page.read_text(encoding="utf-8")))} == {}
    styles = [path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.css")]
    assert styles
    assert [style for style in styles if re.search(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//", style)] == []
