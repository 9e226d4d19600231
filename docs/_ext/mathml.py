"""Formulas as MathML, which browsers draw by themselves, and a font for it: no script, no network.

Brackets and roots grow only in fonts that have a table of mathematics, and few systems bring one. STIX Two Math, from
the package ziamath, is cut down to the characters of formulas.
"""

from pathlib import Path

import ziamath
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from fontTools import subset
from sphinx.util import logging

logger = logging.getLogger(__name__)
FONT = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
CHARACTERS = {
    "Latin": (0x20, 0xFF),
    "Greek": (0x370, 0x3FF),
    "punctuation": (0x2010, 0x2044),
    "h": (0x210E, 0x210E),
    "arrows": (0x2190, 0x21FF),
    "operators": (0x2200, 0x22FF),
    "brackets": (0x2308, 0x230B),
    "angle brackets": (0x27E6, 0x27EB),
    "italic": (0x1D434, 0x1D467),
    "Greek italic": (0x1D6E2, 0x1D71B),
}


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


def write_font(app):
    options = subset.Options(flavor="woff")
    font = subset.load_font(str(FONT), options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[code for first, last in CHARACTERS.values() for code in range(first, last + 1)])
    subsetter.subset(font)
    folder = Path(app.doctreedir, "fonts")
    folder.mkdir(parents=True, exist_ok=True)
    subset.save_font(font, str(folder / "mathematics.woff"), options)
    app.config.html_static_path.append(str(folder))


def setup(app):
    app.connect("builder-inited", write_font)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
