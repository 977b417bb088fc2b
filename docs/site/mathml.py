"""Formulas as MathML, by docutils' own converter: every browser of today shows it, without a script and offline."""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

# What the docstrings use and docutils does not know: sizes of brackets, which MathML stretches by itself; \\dots.
PLAIN = [(re.compile(r"\\[bB]ig+(?![a-zA-Z])"), ""), (re.compile(r"\\dots\b"), r"\\ldots")]
logger = logging.getLogger(__name__)


def converted(node: nodes.math | nodes.math_block, as_block: bool) -> str:
    """The formula of a node as MathML; one that docutils cannot read is a warning, which ends a strict build."""
    formula = node.astext()
    for known_by_latex, known_here in PLAIN:
        formula = known_by_latex.sub(known_here, formula)
    try:
        return tex2mathml(formula, as_block=as_block)
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        return ""


def visit_math(translator, node: nodes.math) -> None:
    translator.body.append(converted(node, as_block=False))
    raise nodes.SkipNode


def visit_math_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{converted(node, as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
