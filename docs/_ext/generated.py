"""Pages that are made when the site is built: of each method, of each example; and links to them from the others."""

import method_pages
import script_pages
import shown
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)


def write_pages(app):
    method_pages.write()
    script_pages.write()
    for name in shown.without_page():
        LOGGER.warning("%s is public and has no page: name it in docs/api", name)


def add_links(app, docname, source):
    source[0] = script_pages.with_links(method_pages.with_links(docname, source[0]))


def setup(app):
    app.connect("builder-inited", write_pages)
    app.connect("source-read", add_links)
    return {"parallel_read_safe": True}
