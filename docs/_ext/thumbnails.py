"""The gallery's thumbnails get a text alternative: the title of their example. Sphinx-Gallery leaves it empty."""

import re

from docutils import nodes


def describe(app, doctree, _):
    for image in doctree.findall(nodes.image):
        example = re.search(r"sphx_glr_(plot_\w+)_thumb", image["uri"])
        if example:
            title = app.env.titles[f"gallery/{example[1]}"].astext()
            image["alt"] = f"From the example: {title}"


def setup(app):
    app.connect("doctree-resolved", describe)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
