"""How Sphinx builds these pages: `make docs`."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]
shutil.rmtree(HERE / "reference/generated", ignore_errors=True)  # pages of modules that may be gone

project = "Stillhouse"
author = "The Stillhouse authors"
copyright = "The Stillhouse authors, Apache-2.0"
extensions = [
    "myst_parser",
    "sphinx_design",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "docstrings",
    "mathml",
    "measured",
]
exclude_patterns = ["_build", "extensions", "examples"]
templates_path = ["templates"]
default_role = "code"

# Markdown: `$...$` and `$$...$$` are formulas, `:::{name}` directives; headings can be linked to by their text.
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "Stillhouse"
html_static_path = ["static"]
html_css_files = ["stillhouse.css"]
html_show_sourcelink = False
html_sidebars = {"data": [], "idea": []}  # pages of no section
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
}

autosummary_generate = True
autosummary_imported_members = False
autodoc_inherit_docstrings = False  # those of Lightning are written for Lightning
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
add_module_names = False
napoleon_custom_sections = [("Errors", "Raises")]
# Names of types from elsewhere, whose documentation would have to be fetched: shown, not linked.
_ELSEWHERE = [
    "abc",
    "collections",
    "enum",
    "filelock",
    "matplotlib",
    "numpy",
    "os",
    "pathlib",
    "PIL",
    "pytorch_lightning",
    "torch",
    "tqdm",
    "zipfile",
]
nitpick_ignore_regex = [(r"py:.*", rf"({'|'.join(_ELSEWHERE)})\..*"), (r"py:.*", r".*\._\w+")]
