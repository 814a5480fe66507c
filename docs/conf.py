"""How Sphinx builds the site: `make docs` writes it into docs/_build, and reads nothing from another machine."""

from __future__ import annotations

import sys
from pathlib import Path

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
html_title = "personalized_soups"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
