"Formulas as MathML when the site is built: the reader's browser needs no script and no network."
import re

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
CONVERTER = LatexToMathML(fancy_error=False)
# Chromium lets the base line of a stretched bar slip where it carries an exponent; something empty beside it helps.
RAISED_BAR = re.compile(r'(<ms(?:up|ub|ubsup)>)(<mo stretchy="true"[^>]*>[^<]*</mo>)')


def mathml(node: nodes.Node, block: bool) -> str:
    latex = node.astext()
    try:
        found = CONVERTER.convert_with_local_state(latex, displaystyle=block)
    except LatexError as error:
        LOGGER.warning("the formula %r cannot be shown: %s", latex, error, location=node)
        return ""
    return RAISED_BAR.sub(r"\1<mrow>\2<mi></mi></mrow>", found)


def inline(writer, node: nodes.math) -> None:
    writer.body.append(mathml(node, False))
    raise nodes.SkipNode


def block(writer, node: nodes.math_block) -> None:
    writer.body.append(f'<span class="formula">{mathml(node, True)}</span>')  # a div would end the paragraph around it
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
