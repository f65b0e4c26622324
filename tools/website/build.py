"The site: a page for each notebook, an index of the package's names, and what the search looks through."
import json
import shutil
import time
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pygments.formatters import HtmlFormatter

from .code import CodeCells, Picture, add_solution
from .names import Module, Name, Names
from .notebooks import Notebook, grouped, notebooks
from .prose import Prose, sections

ROOT = Path(__file__).resolve().parents[2]
PARTS = Path(__file__).resolve().parents[1]/"site"
LIGHT, DARK = "default", "github-dark"                                    # pygments' styles of code
TEMPLATES = Environment(loader=FileSystemLoader(PARTS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                        keep_trailing_newline=True)

@dataclass
class Page:
    "A rendered notebook: `found` are its sections for the search, `files` what has to lie beside it (path in _docs/ → bytes)."
    book: Notebook
    body: str
    outline: list[tuple[int, str, str]]
    found: list[dict[str, str]]
    files: dict[str, bytes]

def images_of(prose: Prose, book: Notebook, folder: Path) -> dict[str, bytes]:
    "The files that a page's markdown shows."
    paths = {(folder/book.path.parent/url).resolve() for url in prose.images}
    return {p.relative_to(folder.resolve()).as_posix(): p.read_bytes() for p in sorted(paths)}

def rendered(book: Notebook, names: Names, by_cell: dict[str, list[Name]], folder: Path) -> Page:
    prose = Prose(book, partial(names.link, book=book))
    pictures: list[Picture] = []
    code = CodeCells(book, by_cell, pictures)
    body, texts = [], {"": ""}
    for cell in book.cells:
        if cell.kind == "code":
            piece = code.html(cell, prose.outline[-1][2] if prose.outline else book.title)
            if cell.solution: add_solution(body, piece)
            else: body.append(piece)
            continue
        body.append(prose.html(cell.text))
        for anchor, text in sections(body[-1]):
            key = next(reversed(texts)) if anchor is None else anchor
            texts[key] = f"{texts.get(key, '')} {text}".strip()
    titles = {anchor: title for _, anchor, title in prose.outline}
    found = [dict(t=titles[a], p=book.title, u=f"{book.url}#{quote(a)}", x=text) for a, text in texts.items() if a]
    return Page(book, "".join(body), prose.outline, found, images_of(prose, book, folder) | {p.url: p.png for p in pictures})

# --- the index of names ---

def ticked(text: str) -> Markup:
    "A docstring's words, `code` as code."
    pieces = text.replace("``", "`").split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else Markup(escape(p, quote=False)) for i, p in enumerate(pieces))

TEMPLATES.filters["ticked"] = ticked

def entries(module: Module) -> list[dict[str, str]]:
    "A module's names for the search, methods as `Class.method`."
    every = [n for name in module.own for n in (name, *name.methods)]
    return [dict(t=n.name, p=module.dotted, u=n.url, x=n.summary.replace('`', ''), k=n.kind, s=n.signature) for n in every]

# --- pages ---

def navigation(groups: dict[str, list[Notebook]], up: str, here: str) -> list[dict]:
    "The sidebar's groups as a page at `up` below the top sees them."
    return [dict(label=label, open=any(b.url == here for b in books),
                 pages=[dict(title=b.title, url=up+b.url, here=b.url == here, code=b.module is not None) for b in books])
            for label, books in groups.items()]

def page_html(page: Page, groups: dict[str, list[Notebook]]) -> str:
    book = page.book
    order = [b for books in groups.values() for b in books]
    at = order.index(book)
    return TEMPLATES.get_template("page.html").render(
        title=book.title, up=book.up, here=book.url, groups=navigation(groups, book.up, book.url), body=Markup(page.body),
        label=next(label for label, books in groups.items() if book in books),
        notebook=f"nbs/{book.path.as_posix()}", module=f"qcal_nb.{book.module}" if book.module else None,
        outline=[dict(level=level, url=f"#{quote(a)}", title=title) for level, a, title in page.outline if level in (2, 3)],
        before=order[at-1] if at else None, after=order[at+1] if at+1 < len(order) else None)

def api_html(groups: dict[str, list[Notebook]], names: Names) -> str:
    return TEMPLATES.get_template("api.html").render(
        title="API index", up="", here="api.html", groups=navigation(groups, "", "api.html"), outline=[],
        modules=names.modules, count=sum(len(m.own) for m in names.modules))

def style() -> str:
    "The one style sheet: ours, and pygments' colours for both schemes."
    rules = {name: HtmlFormatter(style=name).get_style_defs(".highlight") for name in (LIGHT, DARK)}
    return f"{(PARTS/'style.css').read_text(encoding='utf-8')}\n{rules[LIGHT]}\n@media (prefers-color-scheme: dark) {{\n{rules[DARK]}\n}}\n"

def search_data(pages: list[Page], names: Names) -> str:
    found = [d for m in names.modules for d in entries(m)] + [d for p in pages for d in p.found]
    return f"window.QCAL_SEARCH = {json.dumps(found, ensure_ascii=False, separators=(',', ':'))};\n"

def write(out: Path, files: dict[str, str | bytes]) -> None:
    for path, content in sorted(files.items()):
        target = out/path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

def parts() -> dict[str, bytes]:
    "What is copied as it is: the scripts, the font, and their licences."
    return {f"parts/{p.name}": p.read_bytes() for p in [PARTS/"site.js", *sorted((PARTS/"vendor").iterdir())]}

def docs(root: Path = ROOT, out: Path | None = None) -> Path:
    "Write the site of the notebooks as they are committed, outputs included; returns its folder, _docs/ unless told."
    start, out, folder = time.perf_counter(), out or root/"_docs", root/"nbs"
    books = notebooks(folder)
    groups = grouped(books)
    names = Names(root/"qcal_nb", [b for group in groups.values() for b in group])
    by_cell: dict[str, list[Name]] = {}
    for name in (n for m in names.modules for own in m.own for n in (own, *own.methods)): by_cell.setdefault(name.cell, []).append(name)
    pages = [rendered(b, names, by_cell, folder) for group in groups.values() for b in group]
    files: dict[str, str | bytes] = {p.book.url: page_html(p, groups) for p in pages}
    for page in pages: files |= page.files
    files |= parts() | {"api.html": api_html(groups, names), "parts/style.css": style(), "parts/search-data.js": search_data(pages, names)}
    shutil.rmtree(out, ignore_errors=True)                                # only now: what cannot be built leaves the old site standing
    write(out, files)
    size = sum(len(f.encode() if isinstance(f, str) else f) for f in files.values())
    print(f"{len(pages)} chapters and an index of {len(names.own)} names in {time.perf_counter()-start:.0f} s, {size/1e6:.0f} MB")
    print(f"open {(out/'index.html').resolve().as_uri()}")
    return out
