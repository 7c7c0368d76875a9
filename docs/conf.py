"""The documentation site: `make docs`. Built offline, with every notebook run and warnings as errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(HERE.parent))  # this checkout, and what its examples import

from hookattn.version import __version__  # noqa: E402

project = "hookattn"
author = "the hookattn developers"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_nb",  # the pages: Markdown, some of it notebooks
    "sphinx.ext.autodoc",  # the reference, of docstrings
    "sphinx.ext.napoleon",  # which are in Google's style
    "sphinx_click",  # the command line, of its own help
    "public_names",  # every name of a package's __all__
]
exclude_patterns = ["_build", "coverage.md"] if os.environ.get("HOOKATTN_DOCS_QUICK") else ["_build"]
html_theme = "furo"
html_title = f"hookattn {__version__}"

html_show_sphinx = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
# What is outside of the pages is there in the repository: a link to it is one to a file.
nb_execution_mode = os.environ.get("HOOKATTN_DOCS_NOTEBOOKS", "force")
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # nothing is fetched when a page is read
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # a bar is no part of what a cell says

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # an attribute that stands in a docstring and in the class is one
# Shared by many classes of the library, whose docstrings say what differs.
suppress_warnings = ["myst.header", "ref.python"]  # two packages may have a class of one name


def setup(app: object) -> None:
    """The help of the command line is text: a * in it is a *."""

    def escaped(app: object, context: object, lines: list[str]) -> None:
        lines[:] = [line.replace("*", r"\*") for line in lines]

    app.connect("sphinx-click-process-options", escaped)  # type: ignore[attr-defined]
