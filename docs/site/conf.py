"""Sphinx configuration: `make docs` builds the pages of docs/ and the READMEs of recipes/ into build/site.

The source folder is the whole repository, so that a link between two pages is the same on GitHub and on the site.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # mathml.py; the package as it stands here

import lightning_feat  # noqa: E402

project = "lightning_feat"
author = "The lightning_feat developers"
copyright = author
version = release = lightning_feat.__version__

root_doc = "docs/index"
include_patterns = ["docs/**", "recipes/*/README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "build", "dist", "runs", "findings", "lightning_feat", "tests", "benchmarks", "docs/site"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "mathml"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_dmath_double_inline = True

autodoc_inherit_docstrings = False  # else each hook comes with Lightning's explanation of it
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False

html_theme = "furo"
html_title = f"lightning_feat {version}"
html_math_renderer = "mathml"  # by the browser: no script, no font from elsewhere
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["root"]  # index.html, which leads to docs/
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5a86", "color-brand-content": "#0b5a86"},
    "dark_css_variables": {"color-brand-primary": "#7cc4f0", "color-brand-content": "#7cc4f0"},
}
pygments_style = "friendly"
pygments_dark_style = "monokai"
copybutton_exclude = ".linenos, .gp, .go"
