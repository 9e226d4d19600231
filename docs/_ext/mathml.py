"""Formulas as MathML, which browsers draw by themselves: no script, no fonts, no network."""

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)


def mathml(tex, block):
    """`tex` as a <math> element; several lines or columns are aligned as amsmath's `aligned` does."""
    aligned = ("\\\\" in tex or "&" in tex) and not tex.lstrip().startswith("\\begin{align")
    return tex2mathml(f"\\begin{{aligned}}{tex}\\end{{aligned}}" if aligned else tex, as_block=block)


def visit_inline(self, node):
    write(self, node, "{}", block=False)


def visit_block(self, node):
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    write(self, node, self.starttag(node, "div", CLASS="formula") + number + "{}</div>\n", block=True)


def write(self, node, form, block):
    """Put the formula of `node` into the page, `form` around it, and go on behind it."""
    try:
        self.body.append(form.replace("{}", mathml(node.astext(), block)))
    except MathError as error:
        logger.warning("no formula of TeX: %s: %s", error, node.astext(), location=node)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
