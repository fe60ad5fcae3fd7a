"""Links of the Markdown files, which GitHub follows in the checkout, lead to the pages of the site.

A file of the repository that is a page here (`PAGES`) is linked as that page. Any other file or folder is named, since
the site does not hold it. A link to what is not in the checkout is a warning, and so an error of the build.
"""

import os
import re
from pathlib import Path

from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "start/readme",
    "CONTRIBUTING.md": "project/contributing",
    "CHANGELOG.md": "project/changelog",
    "RELEASING.md": "project/releasing",
    "experiments/README.md": "project/experiments",
    "experiments/studies/whitening/README.md": "project/whitening",
    "docs/design": "design/index",
}
LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
SOURCE = re.compile(r"```\{include\} (\S+)\n```")


def included(app, docname, source):
    """Puts the text of an included file in, and turns the links of the page."""
    page = ROOT / "docs" / docname
    text, folder = source[0], page.parent
    if match := SOURCE.search(text):
        path = (page.parent / match[1]).resolve()
        app.env.note_dependency(str(path))
        text, folder = text.replace(match[0], path.read_text(encoding="utf-8")), path.parent
    if Path(app.env.doc2path(docname)).suffix != ".md":
        return
    source[0] = turned(text, folder, page.parent, docname)


def turned(text, folder, here, docname=None):
    """The text with its links turned, of a file that lies in `folder` and is shown by a page in `here`."""

    def link(match):
        words, target, section = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (folder / target).resolve()
        if not path.exists():
            logging.getLogger(__name__).warning("link to %s, which does not exist", target, location=docname)
        name = path.relative_to(ROOT).as_posix()
        if name in PAGES:
            return f"[{words}]({relative(ROOT / 'docs' / (PAGES[name] + '.md'), here)}{section})"
        if path.is_relative_to(ROOT / "docs") and path.is_file():
            return f"[{words}]({relative(path, here)}{section})"
        plain = words.strip("`")
        return f"`{plain}`" if plain in (name, target, path.name) else f"{words} (`{name}`)"

    def image(match):
        if "://" in match[2]:
            return match[0]
        return f"![{match[1]}]({relative((folder / match[2]).resolve(), here)})"

    return LINK.sub(link, IMAGE.sub(image, text))


def relative(path, here):
    return os.path.relpath(path, here).replace(os.sep, "/")


def setup(app):
    app.connect("source-read", included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
