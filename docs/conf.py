"Sphinx's settings for the site (`make docs`). What notebooks of nbdev need beyond them: the modules beside this file."
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from names import chapter_of as linkcode_resolve  # noqa: E402, F401

project = "qcal_nb"
author = "The qcal_nb developers"
language = "en"
root_doc = "index"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx_copybutton",
    "notebooks",
    "names",
    "formulas",
]

# notebooks, as they are committed
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "dollarmath"]
myst_heading_anchors = 3  # what links of notebooks lead to
myst_dmath_double_inline = True  # $$…$$ in the middle of a paragraph, as Jupyter has it

# the API
default_role = "py:obj"
add_module_names = False
python_use_unqualified_type_names = True
autodoc_preserve_defaults = True
maximum_signature_line_length = 90
autodoc_member_order = "bysource"
autodoc_default_options = {
    "undoc-members": True,
    "no-value": True,
}

# pages
html_theme = "furo"
html_title = "qcal_nb"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
pygments_style = "default"
pygments_dark_style = "github-dark"
copybutton_selector = "div.cell_input div.highlight pre, div.highlight-python pre, div.highlight-sh pre"

# the search: from a folder, pages cannot be fetched for excerpts
html_search_scorer = str(HERE / "_static" / "scorer.js")
html_show_search_summary = False
