"""How Sphinx builds the site: `make docs` writes it into docs/_build, and reads nothing from another machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(_DOCS.parent), str(_DOCS / "_extensions")]

from personalized_soups import __version__  # noqa: E402

project = "personalized_soups"
author = "The personalized_soups authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "schema_table"]
exclude_patterns = ["_build"]
# Docstrings write code between single backticks, as the rest of the source does.
default_role = "code"
python_maximum_signature_line_length = 80

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "Personalized Soups"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def _fields_as_signature(  # noqa: PLR0917  # Sphinx passes seven by position
    app: Sphinx, what: str, name: str, thing: object, options: object, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Show a declared model's fields by name and default; pydantic's own signature shows its internals."""
    fields = getattr(thing, "model_fields", None)
    if what != "class" or fields is None:
        return None
    shown = [key if field.is_required() else f"{key}={field.get_default()!r}" for key, field in fields.items()]
    return f"(*, {', '.join(shown)})", None


def setup(app: Sphinx) -> None:
    """Connect the functions of this file to Sphinx."""
    app.connect("autodoc-process-signature", _fields_as_signature)
