"""The documentation site; docs/design/0024-documentation-site.md says why it is built like this."""

import hashlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import dp_rmt  # noqa: E402  the checkout, whose root was put on the path

project = "dp_rmt"
author = "The dp_rmt authors"
release = version = dp_rmt.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "equations_of_docstrings",
    "links_of_the_repository",
    "mathml",
    "names_in_backticks",
]
exclude_patterns = ["_build", "_ext", "conf.py", "**/.ipynb_checkpoints", "jupyter_execute"]
suppress_warnings: list[str] = []

html_theme = "furo"
html_title = f"dp_rmt {release}"
html_static_path = ["_static"]
templates_path = ["_templates"]  # the list of versions in the sidebar
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False

# Docstrings: Google's sections; `one backtick` is a name, a link where the site has its page; ``two`` are code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Pages: Markdown as GitHub shows it, and tutorials that are Python files in jupytext's percent format.
myst_enable_extensions = ["amsmath", "deflist", "dollarmath", "colon_fence"]
myst_heading_anchors = 4
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "cache" if os.environ.get("DP_RMT_DOCS_EXECUTE") == "1" else "off"
# What a tutorial printed is kept for the next build, until the tutorial or any module of the library changes.
_library = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((HERE.parent / "dp_rmt").rglob("*.py"))))
nb_execution_cache_path = str(HERE / "_build" / "executed" / _library.hexdigest()[:16])
nb_execution_in_temp = True  # a tutorial writes files
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # its models are so small that compiling takes longest
nb_execution_timeout = 900  # for a cell on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars
