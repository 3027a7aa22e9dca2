"""Pages that are made when the site is built: of each method, of each example; and links to them from the others."""

import chex
import method_pages
import script_pages
import shown
from sphinx.util import logging
from sphinx.util.nodes import make_refnode
from sphinx.util.typing import stringify_annotation

LOGGER = logging.getLogger(__name__)
# What Sphinx makes of chex's types, which are unions, and their names.
SPELLED_OUT = {stringify_annotation(getattr(chex, name), "smart"): f"~chex.{name}" for name in ("ArrayTree", "Numeric")}


def write_pages(app):
    method_pages.write()
    script_pages.write()
    for name in shown.without_page():
        LOGGER.warning("%s is public and has no page: name it in docs/api", name)


def add_links(app, docname, source):
    source[0] = script_pages.with_links(docname, method_pages.with_links(docname, source[0]))


def shorten(app, what, name, obj, options, signature, returned):
    for spelled_out, alias in SPELLED_OUT.items():
        signature, returned = (text and text.replace(spelled_out, alias) for text in (signature, returned))
    return signature, returned


def find_short_name(app, env, node, contnode):
    """Where docstrings leave out the module of a name, for who reads them in an editor: the shortest that ends so."""
    if node["refdomain"] != "py":
        return None
    domain, target = env.domains.python_domain, node["reftarget"]
    found = [name for name in domain.objects if name.startswith("mtlbalance.") and name.endswith(f".{target}")]
    if not found:
        return None
    name = min(found, key=len)
    entry = domain.objects[name]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def setup(app):
    app.connect("autodoc-process-signature", shorten)
    app.connect("missing-reference", find_short_name)
    app.connect("builder-inited", write_pages)
    app.connect("source-read", add_links)
    return {"parallel_read_safe": True}
