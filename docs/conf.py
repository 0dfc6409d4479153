"""Sphinx: the pages of this folder, and the API reference from the docstrings. sphinx-build -W docs build/docs"""

from __future__ import annotations

import sigswap

project = "sigswap"
author = "the sigswap authors"
version = release = sigswap.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images"]
html_theme = "furo"

myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Every reference in a docstring must lead somewhere (sphinx-build -n), but for names that no page here documents.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|typing|os|rich)\..*"),  # other projects'
    (r"py:.*", r"TrainerCallback"),  # transformers', which is not imported here
    (
        r"py:.*",
        r"sigswap\.(kernels|passes|conversion|compiling|sequence|training)\..*",
    ),  # for readers of the source
]
