"""How Sphinx builds the site: `python -m sphinx -W -b html docs build/site`.

Needs `python -m pip install -e ".[docs]"`, and PyTorch for some of the examples. Nothing is fetched: formulas become
MathML in a font from ziamath, the charts' JavaScript comes from vl-convert-python. Texts and pictures that come from
the code are made by `_ext/`.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

import fastopt  # noqa: E402

project = "fastopt"
author = "the fastopt contributors"
copyright = author
version = release = fastopt.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "kernel_texts",
    "optimizer_pages",
    "schedule_pictures",
    "benchmark_charts",
    "gallery_pages",
]
suppress_warnings = ["config.cache"]  # functions among the gallery's settings

# --- Text

default_role = "py:obj"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_default_options = {"members": True}
autodoc_typehints = "none"  # numpydoc's sections have the types in words, with bounds
numpydoc_show_class_members = False
copybutton_exclude = ".linenos, .gp, .go"
doctest_global_setup = "import numpy as np\nimport fastopt"

sphinx_gallery_conf = {
    "ignore_pattern": r"zero_with_mpi\.py",  # runs on several processes; the guide shows it
    "examples_dirs": [str(DOCS.parent / "examples")],
    "gallery_dirs": ["gallery"],
    "backreferences_dir": "gallery/backreferences",
    "doc_module": ("fastopt",),
    "reference_url": {"fastopt": None},
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "write_computation_times": False,  # its table would load a script from elsewhere
    "image_srcset": ["2x"],
    "within_subsection_order": "gallery_pages.OrderOfTopics",
    "capture_repr": (),
    "abort_on_example_error": True,
}

# --- Pages

html_theme = "pydata_sphinx_theme"
html_title = "fastopt"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("benchmark", "benchmark_report", "topics", "changelog", "contributing")}
toc_object_entries = False
html_copy_source = False
html_show_search_summary = False  # a page opened as a file may not read others
html_theme_options = {
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "back_to_top_button": False,
}
