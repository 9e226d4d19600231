"""The gallery's order, which is that of the table of topics, and text alternatives for its thumbnails."""

import re
from pathlib import Path

from docutils import nodes

TOPICS = Path(__file__).resolve().parents[1] / "topics.md"


class OrderOfTopics:
    """Key by which Sphinx-Gallery sorts the files of a folder."""

    def __init__(self, _):
        self.names = re.findall(r"gallery/(plot_\w+)\.rst", TOPICS.read_text(encoding="utf-8"))

    def __call__(self, file):
        name = file.removesuffix(".py")
        return self.names.index(name) if name in self.names else len(self.names)

    def __repr__(self):
        return f"<{type(self).__name__}>"  # Sphinx compares settings by their text


def describe_thumbnails(app, doctree, _):
    """Sphinx-Gallery leaves their text alternative empty: it is the title of the example."""
    for image in doctree.findall(nodes.image):
        example = re.search(r"sphx_glr_(plot_\w+)_thumb", image["uri"])
        if example:
            title = app.env.titles[f"gallery/{example[1]}"].astext()
            image["alt"] = f"From the example: {title}"


def setup(app):
    app.connect("doctree-resolved", describe_thumbnails)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
