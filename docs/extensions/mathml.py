"""Formulas as MathML, which browsers show by themselves: no script, no font and no network at reading or building time."""

from docutils.nodes import SkipNode
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def inline(self: HTML5Translator, node) -> None:
    self.body.append(_mathml(node, block=False))
    raise SkipNode


def display(self: HTML5Translator, node) -> None:
    self.body.append(f'<div class="formula">{_mathml(node, block=True)}</div>\n')
    raise SkipNode


def _mathml(node, block: bool) -> str:
    try:
        return latex2mathml.tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logger.warning("this formula can't be read: %s", error, location=node)
        return ""


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
