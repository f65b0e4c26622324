"Markdown cells as HTML: formulas as MathML, headings with anchors, names of the package linked to their definition."
import re
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path
from urllib.parse import quote

from bs4 import BeautifulSoup
from math_core import LatexError, LatexToMathML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from .notebooks import Notebook, page_of

FORMULAS = LatexToMathML(fancy_error=False)
# Chromium lets the base line of a stretched bar slip where the bar carries an exponent; something empty beside it keeps it in place.
RAISED_BAR = re.compile(r'(<ms(?:up|ub|ubsup)>)(<mo stretchy="true"[^>]*>[^<]*</mo>)')

def formula(latex: str, block: bool, where: str) -> str:
    "MathML of a formula; one that cannot be converted ends the build, with the notebook `where` it stands."
    try: return RAISED_BAR.sub(r"\1<mrow>\2<mi></mi></mrow>", FORMULAS.convert_with_local_state(latex, displaystyle=block))
    except LatexError as error: raise ValueError(f"{where}: the formula {latex!r} cannot be shown: {error}") from error

def plain(html: str) -> str: return " ".join(unescape(re.sub(r"<[^>]+>", "", html)).split())

class Prose(IPythonRenderer):
    "Renders the markdown of one page; `outline` collects (level, anchor, title), `images` the files that it shows."
    def __init__(self, book: Notebook, link_of: Callable[[str], str | None]):
        super().__init__(escape=False)
        self.book, self.link_of = book, link_of
        self.outline: list[tuple[int, str, str]] = []
        self.images: list[str] = []
        self.parser = MarkdownWithMath(renderer=self)

    def html(self, markdown: str) -> str: return self.parser.render(markdown)

    def heading(self, text: str, level: int, **attrs) -> str:
        title = plain(text)
        anchor = title.replace(" ", "-")                                  # as JupyterLab makes it
        seen = sum(a.rpartition("~")[0] == anchor or a == anchor for _, a, _ in self.outline)
        if seen: anchor = f"{anchor}~{seen + 1}"
        self.outline.append((level, anchor, title))
        mark = f'<a class="mark" href="#{quote(anchor)}" aria-label="Link to this section">#</a>'
        return f'<h{level} id="{escape(anchor)}">{text}{mark}</h{level}>\n'

    def inline_math(self, body: str) -> str: return formula(body, False, self.book.path.as_posix())
    def block_math(self, body: str) -> str:
        return f'<span class="formula">{formula(body, True, self.book.path.as_posix())}</span>'
    def latex_environment(self, name: str, body: str) -> str: return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def codespan(self, text: str) -> str:
        url = self.link_of(unescape(text))
        return f'<a class="name" href="{url}">{super().codespan(text)}</a>' if url else super().codespan(text)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        path, sharp, anchor = url.partition("#")
        if path.endswith(".ipynb") and ":" not in path: url = page_of(Path(path)).as_posix()+sharp+anchor
        return super().link(re.sub(r'<a class="name"[^>]*>(.*?)</a>', r"\1", text), url, title)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        if ":" not in url: self.images.append(url)
        return super().image(text, url, title).replace("<img", '<img loading="lazy"', 1)

    def table(self, text: str) -> str: return f'<div class="scroll" tabindex="0"><table>{text}</table></div>\n'

def sections(html: str) -> list[tuple[str | None, str]]:
    "Pieces of a rendered cell as (anchor of the heading above or None, text); what is folded away stays out."
    soup = BeautifulSoup(html, "html.parser")
    for folded in soup(["details", "pre"]): folded.decompose()
    for mark in soup("a", "mark"): mark.decompose()
    found: list[tuple[str | None, str]] = [(None, "")]
    for node in soup.children:
        if re.fullmatch(r"h[1-6]", node.name or ""): found.append((node["id"], ""))
        else: found[-1] = (found[-1][0], found[-1][1]+" "+node.get_text())
    return [(anchor, " ".join(text.split())) for anchor, text in found]
