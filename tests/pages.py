"""What a user reads: the README and the site's pages, as they stand in the repository, and the code in them."""

import ast
import pathlib
import re

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
OURS = {"mtl": mtl, "aggregation": aggregation, "scalarization": scalarization}
FENCED_OR_HEADING = re.compile(r"^```([^\n]*)\n(.*?)^```$|^#+ ([^\n]*)$", re.MULTILINE | re.DOTALL)


def read(page):
    """The text of a page of the site, by its path in ``docs``."""
    return (DOCS / page).read_text()


def blocks_of(page, text, language="python"):
    """By page and heading; a comment in a block is no heading."""
    heading, n_below = "", 0
    for found in FENCED_OR_HEADING.finditer(text):
        if found[3] is not None:
            heading, n_below = found[3], 0
        elif found[1] == language:
            yield f"{page}-{heading}" + (f" {n_below}" if n_below else ""), found[2]
            n_below += 1


def block_below(page, heading, language="python"):
    """The first one."""
    return next(block for name, block in blocks_of(page, read(page), language) if name == f"{page}-{heading}")


def imported(block):
    """The packages that a block imports. One without any is a part of a program."""
    for node in ast.walk(ast.parse(block)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (name.partition(".")[0] for name in names)


def not_ours(text):
    """The names that a text has from our modules and that are not there; also in blocks that are not run, and diffs."""
    named = re.findall(rf"(?<![\w./])({'|'.join(OURS)})\.(\w+)", text)
    return [f"{module}.{name}" for module, name in named if name != "md" and not hasattr(OURS[module], name)]


def slug(heading):
    """As GitHub and MyST make it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def links_of(text):
    """Of a page in Markdown, and of the HTML in it: where they lead, pictures among them."""
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)


def dead_links(path, made=()):
    """The links of the page at ``path`` that lead nowhere in the repository, nor to ``made``, the pages of a build."""
    links = links_of(path.read_text())
    return [link for link in links if not link.startswith("http") and not _leads_somewhere(path, link, made)]


def _leads_somewhere(path, link, made):
    file, _, anchor = link.partition("#")
    target = (DOCS / file[1:] if file.startswith("/") else path.parent / file).resolve() if file else path
    if target in made or not target.exists():
        return target in made
    return not anchor or anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE))
