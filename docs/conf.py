"""The site: ``sphinx-build -W --keep-going -b html docs docs/_build``, after ``pip install -e ".[docs]"``."""

import pathlib
import sys

import mtlbalance

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project = "mtlbalance"
author = "the mtlbalance authors"
copyright = "the mtlbalance authors"
version = release = mtlbalance.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "sphinx_design",
    "generated",
]
exclude_patterns = ["_build", "_ext"]

html_theme = "furo"
html_title = f"mtlbalance {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_show_sphinx = False
templates_path = []

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_ivar = True  # attributes in their class's own text: its fields are no pages
napoleon_use_rtype = False
copybutton_prompt_text = ">>> |\\.\\.\\. |\\$ "
copybutton_prompt_is_regexp = True

# A text file beside this one has the few names that the site links to: without a network they still resolve.
intersphinx_mapping = {
    name: (url, (None, str(HERE / "inventories" / f"{name}.txt")))
    for name, url in {
        "jax": "https://docs.jax.dev/en/latest",
        "optax": "https://optax.readthedocs.io/en/latest",
        "flax": "https://flax.readthedocs.io/en/latest",
        "numpy": "https://numpy.org/doc/stable",
        "python": "https://docs.python.org/3",
    }.items()
}
intersphinx_timeout = 5

# Every reference to a name of this library must lead somewhere; those to others may be types without a page.
napoleon_attr_annotations = False  # the class's signature has them
nitpicky = True
OWN = r"mtlbalance\.|\w+State$|(Counted|Scalarizer|Aggregator|Weighting|Rowwise|Task|Audit|Estimate|ComplexParts)$"
nitpick_ignore_regex = [
    ("py:class", rf"(?!{OWN}).*"),
    # Type variables and aliases, which are no classes.
    ("py:class", r"mtlbalance\.(memo\.R|wrappers\.(plumbing\.Method|checked\.AnyMethod)|annotations\.\w+)"),
    ("py:(func|meth|mod|data|obj|exc)", r"(jax|optax|flax|numpy|chex|orbax|typing)\..*"),
]
