"""A page for each script of ``examples/``: what it says of itself, its picture, its text."""

import ast
import pathlib
import re

DOCS = pathlib.Path(__file__).parents[1]
EXAMPLES, PAGES = DOCS.parent / "examples", DOCS / "examples"


def write_if_new(path, text):
    """Pages that are as they were keep their time, so that Sphinx does not read them again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def names():
    return sorted(path.stem for path in EXAMPLES.glob("*.py"))


def page(name):
    about = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
    parts = [f"# {name}.py", f"```{{eval-rst}}\n{about}\n```"]
    if (EXAMPLES / f"{name}.png").exists():
        parts.append(f"![What {name}.py draws](../../examples/{name}.png)")
    parts.append(f"```{{literalinclude}} ../../examples/{name}.py\n:language: python\n```")
    return "\n\n".join(parts) + "\n"


def write():
    for name in names():
        write_if_new(PAGES / f"{name}.md", page(name))


def gallery():
    """A card for each picture that a script draws."""
    lines = ["::::{grid} 1 2 2 3", ":gutter: 3", ""]
    for path in sorted(EXAMPLES.glob("*.png")):
        lines += [f":::{{grid-item-card}} {path.stem}.py", f":link: /examples/{path.stem}", ":link-type: doc"]
        lines += [f":img-top: ../../examples/{path.name}", ":::"]
    return "\n".join([*lines, "::::"])


def with_links(docname, text):
    """Links to scripts lead to their pages, those to pages outside of the site to their files, as in the repository."""
    text = text.replace("<!-- pictures -->", gallery()) if docname == "examples/index" else text
    text = re.sub(r"\]\(((?:\.\./)+tests/[\w/]+\.md)\)", r"](path:\1)", text)
    return re.sub(r"\]\((?:\.\./)+examples/(\w+)\.py\)", r"](/examples/\1.md)", text)
