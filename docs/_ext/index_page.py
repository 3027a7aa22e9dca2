"""README.md as an index shows it, where a link that is relative leads nowhere: made when the package is built."""

import pathlib
import re

from hatchling.metadata.plugin.interface import MetadataHookInterface

FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
RELATIVE = r"(?!\w+:|#)"  # neither with a scheme nor a heading of the page itself
PICTURE = re.compile(rf"!\[([^\]]*)\]\({RELATIVE}([^)\s]+)\)")
THUMBNAIL = re.compile(rf'<img src="{RELATIVE}([^"]+)"([^>]*)>(<br>)?')
LINK = re.compile(rf"(?<!!)\[([^\]]*)\]\({RELATIVE}([^)\s]+)\)")


def index_page(readme, repository=None):
    """With a repository's address its links lead there; without one they are plain text, and pictures are left out."""
    in_text = lambda text: _linked(text, repository.rstrip("/")) if repository else _plain(text)
    return "".join(part if part.startswith("```") else in_text(part) for part in FENCED.split(readme))


def _linked(text, repository):
    files, bytes_of = f"{repository}/blob/HEAD", f"{repository}/raw/HEAD"  # as GitHub has them, and hosts like it
    text = PICTURE.sub(rf"![\1]({bytes_of}/\2)", text)
    text = THUMBNAIL.sub(rf'<img src="{bytes_of}/\1"\2>\3', text)
    return LINK.sub(rf"[\1]({files}/\2)", text)


def _plain(text):
    text = PICTURE.sub(r"*\2, a picture in the source distribution: \1.*", text)  # the text around it speaks of it
    return LINK.sub(r"\1", THUMBNAIL.sub("", text))


class IndexPage(MetadataHookInterface):
    def update(self, metadata):
        readme = (pathlib.Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = index_page(readme, metadata.get("urls", {}).get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
