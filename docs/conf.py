"""Sphinx configuration: ``sphinx-build -W -b html docs docs/_build``, where gangline is importable."""

import sys
from pathlib import Path

from gangline import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "gangline"
author = "The gangline maintainers"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code"]
exclude_patterns = ["_build", "_generated", "reference/generated"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"gangline {release}"
html_show_sphinx = False
