"""The site of `make docs`: every chapter, link, picture, formula and name; nothing from elsewhere; the same bytes every time."""
import html
import importlib
import importlib.util
import json
import pkgutil
import re
import shutil
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import qcal_nb

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("qcal_tools_docs", ROOT / "tools" / "docs.py")
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)
from website.code import Picture, add_solution, alt, merged, only_imports, terminal_text, text_html  # noqa: I001  tools/docs.py made this importable
from website.names import Name, Names, argument_names, defined
from website.notebooks import Cell, Notebook, drop_copies, grouped, notebooks, read_cell
from website.prose import Prose, sections

EXTERNAL = re.compile(r"(?i)^(https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory): return builder.docs(ROOT, tmp_path_factory.mktemp("site") / "_docs")


@dataclass
class Found(HTMLParser):
    "What a page holds: ids with the text inside, links, files that it loads, text outside of code, open and closed folds around cells."
    ids: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    folded: set[str] = field(default_factory=set)
    stack: list[tuple[str, dict]] = field(default_factory=list)

    def __post_init__(self): super().__init__()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.append(attrs["id"])
        if "id" in attrs and any(t == "details" and "open" not in a for t, a in self.stack): self.folded.add(attrs["id"])
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"])
        if tag == "link" or "src" in attrs: self.loads.append(attrs.get("src", attrs.get("href")))
        if tag == "img": assert attrs.get("alt"), attrs
        if tag not in ("meta", "link", "img", "input", "br", "hr"): self.stack.append((tag, attrs))

    def handle_endtag(self, tag):
        while self.stack and self.stack.pop()[0] != tag: pass

    def handle_data(self, data):
        for _, attrs in self.stack:
            if "id" in attrs: self.texts[attrs["id"]] = self.texts.get(attrs["id"], "") + data
        if not {"code", "pre", "script", "style"} & {t for t, _ in self.stack}: self.words.append(data)


@cache
def look(path: Path) -> Found:
    found = Found()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def pages(site): return sorted(site.rglob("*.html"))


def broken(site):
    "Links, pictures, scripts and styles that lead nowhere, anchors included."
    wrong = []
    for page in pages(site):
        for link in look(page).links + look(page).loads:
            if EXTERNAL.match(link) or link.startswith("data:"): continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.is_file() or (anchor and anchor not in look(target).ids): wrong.append((page.name, link))
    return wrong


def from_elsewhere(site):
    "What a page or a style sheet would load over a network; links that one clicks do not count."
    found = [(page.name, x) for page in pages(site) for x in look(page).loads if EXTERNAL.match(x)]
    for page in [*pages(site), *site.rglob("*.css")]:
        styles = page.read_text(encoding="utf-8") if page.suffix == ".css" else "".join(re.findall(r"(?s)<style.*?</style>", page.read_text("utf-8")))
        found += [(page.name, x) for x in re.findall(r"""(?:url\(|@import\s)\s*["']?([^"')\s]+)""", styles) if EXTERNAL.match(x)]
    return found


def all_names():
    "Every public name as (module, name), from the modules as they are imported."
    for info in [None, *pkgutil.walk_packages(qcal_nb.__path__, "qcal_nb.")]:
        module = importlib.import_module(info.name) if info else qcal_nb
        for name in getattr(module, "__all__", ()): yield module.__name__, name


# --- the whole site ---

@pytest.mark.slow
def test_a_page_for_each_notebook(site):
    books = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert len(pages(site)) == len(books) + 1 > 10  # and the index of names


@pytest.mark.slow
def test_every_link_and_picture_leads_somewhere(site): assert broken(site) == []


@pytest.mark.slow
def test_nothing_comes_from_elsewhere(site): assert from_elsewhere(site) == []


@pytest.mark.slow
def test_what_leads_nowhere_is_seen(site, tmp_path):
    shutil.copytree(site, tmp_path / "_docs")
    (tmp_path / "_docs" / "models.html").rename(tmp_path / "_docs" / "elsewhere.html")
    bad = '<a href="session.html#nowhere"></a><script src="https://x.org/a.js"></script><style>a { background: url(//x.org/b.png) }</style>'
    (tmp_path / "_docs" / "bad.html").write_text(bad)
    assert {("index.html", "models.html"), ("bad.html", "session.html#nowhere")} <= set(broken(tmp_path / "_docs"))
    assert from_elsewhere(tmp_path / "_docs") == [("bad.html", "https://x.org/a.js"), ("bad.html", "//x.org/b.png")]


@pytest.mark.slow
def test_the_same_bytes_twice(site, tmp_path):
    again = builder.docs(ROOT, tmp_path / "_docs")
    files = {p.relative_to(site): p.read_bytes() for p in site.rglob("*") if p.is_file()}
    assert {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()} == files


@pytest.mark.slow
def test_ids_are_unique(site):
    for page in pages(site): assert len(look(page).ids) == len(set(look(page).ids)), page.name


@pytest.mark.slow
def test_next_leads_through_all_chapters(site):
    page, seen = site / "index.html", []
    while page:
        seen.append(page)
        after = re.search(r'<a rel="next" href="([^"]+)"', page.read_text(encoding="utf-8"))
        page = (page.parent / after[1]).resolve() if after else None
    assert sorted(seen) == [p for p in pages(site) if p.name != "api.html"]


@pytest.mark.slow
def test_every_public_name_is_in_the_index_and_leads_to_its_definition(site):
    index = look(site / "api.html")
    where = {link.rpartition("#def-")[2]: site / link.partition("#")[0] for link in index.links if "#def-" in link}
    for module, name in all_names():
        assert name in index.texts[module], (module, name)
        if name != "__version__": assert look(where[name]).texts[f"def-{name}"] == name
    assert index.ids.index("qcal_nb") < index.ids.index("qcal_nb.models")
    assert where["calibrate"].name == "pipelines.html" and "Workbench.from_record" in where


@pytest.mark.slow
def test_formulas_are_drawn(site):
    n = sum(page.read_text(encoding="utf-8").count("<math") for page in pages(site))
    sources = [c for book in notebooks(ROOT / "nbs").values() for c in book.cells if c.kind == "markdown"]
    prose = [re.sub(r"(?s)```.*?```|`[^`]*`", "", c.text) for c in sources]
    assert n >= sum(len(re.findall(r"(?s)\$\$.+?\$\$|(?<![\\$])\$[^$\n]+\$", t)) for t in prose) > 200
    for page in pages(site): assert not re.search(r"\$\$|\\[a-z]+\{|\|\s*---", "".join(look(page).words)), page.name


@pytest.mark.slow
def test_solutions_are_folded(site):
    books = notebooks(ROOT / "nbs").values()
    solutions = [(b, c) for b in books for c in b.cells if c.solution]
    assert len(solutions) > 20
    for b, c in solutions: assert re.sub(r"<[^>]+>", "", (site / b.url).read_text("utf-8")).count(html.escape(c.text, quote=False)) <= 1, c.id
    for book, cell in solutions: assert f"cell-{cell.id}" in look(site / book.url).folded, (book.path, cell.id)
    shown = [(b, c) for b in books for c in b.cells if c.kind == "code" and not c.solution and not only_imports(c)]
    assert not [c.id for b, c in shown if f"cell-{c.id}" in look(site / b.url).folded]


@pytest.mark.slow
def test_what_no_reader_needs_is_gone(site):
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^#\|", text, re.M) and "default_exp" not in re.sub(r"<[^>]+>", "", text), page.name
        assert "\x1b" not in text and "Loading widget" not in text and not re.search(r"\d+%\|.*it/s\]", text), page.name


@pytest.mark.slow
def test_search_data_has_names_and_sentences(site):
    found = json.loads((site / "parts" / "search-data.js").read_text(encoding="utf-8").removeprefix("window.QCAL_SEARCH = ").rstrip(";\n"))
    assert dict(t="calibrate", p="qcal_nb.pipelines", u="pipelines.html#def-calibrate", k="function").items() <= next(
        d for d in found if d["t"] == "calibrate" and d.get("k")).items()
    for d in found:
        path, _, anchor = d["u"].partition("#")
        assert unquote(anchor) in look(site / path).ids, d
        assert not re.search(r"</?(p|a|code|span|math|details)\b", d["x"]), d


# --- its parts ---

def book(*cells, path="00_one.ipynb", module=None): return Notebook(Path(path), path.replace("ipynb", "html"), list(cells), module)
def code(text, id="a1", *tags): return Cell(id, "code", text, frozenset(tags))
def prose(link_of=lambda text: None): return Prose(book(), link_of)


def test_a_formula_that_cannot_be_shown_ends_the_build():
    with pytest.raises(ValueError, match=r"00_one.ipynb: the formula '\\\\foo x' cannot be shown"): prose().html(r"so $\foo x$.")


def test_dollars_are_told_apart():
    html = prose().html("`$x$` costs \\$5, $y$\n\n```sh\necho $HOME $x\n```\n\n$$\\tfrac12$$\n")
    assert html.count("<math") == 2 and "<code>$x$</code> costs $5" in html and "<mi>y</mi>" in html
    assert "$HOME" in re.sub("<[^>]+>", "", html) and "$$" not in html


def test_headings_have_anchors_as_in_jupyterlab():
    page = prose()
    html = page.html("# One\n\n## A `b` & $c$\n\n## Same\n\n## Same\n")
    assert [a for _, a, _ in page.outline] == ["One", "A-b-&-c", "Same", "Same~2"] and 'id="A-b-&amp;-c"' in html
    assert [a for a, _ in sections(html)] == [None, "One", "A-b-&-c", "Same", "Same~2"]


def test_links_lead_to_pages():
    html = prose(lambda text: "m.html#def-x").html("[a](00_models.ipynb#Texts) [`x`](../02_histogram.ipynb) [c](https://x.org/y.ipynb) `x`")
    assert 'href="models.html#Texts"' in html and 'href="../histogram.html"' in html and 'href="https://x.org/y.ipynb"' in html
    assert html.count("m.html#def-x") == 1  # no link within a link


def test_search_leaves_out_what_is_folded():
    html = prose().html("## Exercise\n\nWhy?\n\n<details><summary>Solution</summary>\n\nBecause.\n\n</details>\n")
    assert sections(html)[-1] == ("Exercise", "Why?")


def test_a_terminal_shows_the_end_of_a_line():
    assert terminal_text("\x1b[31mred\x1b[0m\nold\rnew\nload: 0%| | 0/9 [00:00<?, ?it/s]\rload: 100%|##| 9/9 [00:00<00:00, 9.00it/s]\n") == "red\nnew"
    assert text_html("5%|x| 1/2 [") == "" and "&lt;b&gt;" in text_html("<b>")


def test_streams_are_put_together():
    out = [dict(output_type="stream", name=n, text=[t]) for n, t in (("stdout", "a"), ("stdout", "b"), ("stderr", "c"))]
    assert [o["text"] for o in merged(out)] == ["ab", ["c"]]


def test_a_picture_says_what_it_shows():
    assert alt('ax.set(title="Two lines")', "S") == "Picture: Two lines" and alt("plot_ranges(run)", "S") == "Picture: plot_ranges"
    assert alt('fig.suptitle(f"{name}")', "Section") == "Picture of the section “Section”"


def test_a_picture_keeps_its_inches():
    png = next((ROOT / "nbs" / "images").glob("readme-*.png")).read_bytes()
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    dots = b"\0\0\0\x09pHYs" + round(200 / 0.0254).to_bytes(4, "big") * 2 + b"\x01" + b"\0\0\0\0"
    assert Picture("", png).size == (width, height) and Picture("", png[:33] + dots + png[33:]).size == (round(width / 2), round(height / 2))


def test_words_and_code_of_a_solution_share_a_fold():
    body = ["<p>Why?</p>", "<details><summary>Solution</summary>\nBecause.</details>\n"]
    add_solution(body, "<div>1</div>")
    add_solution(body, "<div>2</div>")
    assert body == ["<p>Why?</p>", "<details><summary>Solution</summary>\nBecause.<div>1</div><div>2</div></details>\n"]
    add_solution(alone := ["<details><summary>Hint</summary>Think.</details>"], "<div>1</div>")
    assert alone[1].startswith("<details><summary>Solution</summary>") and alone[1].count("<div>") == 1


def test_long_imports_of_a_module_are_folded():
    lines = "import a\nimport b\nfrom c import (\n    d,\n    e,\n)"
    assert only_imports(code(lines, "a1", "export"))
    assert not any(map(only_imports, (code(lines), code("import a", "a1", "export"), code(lines + "\nx = 1", "a1", "export"))))


def test_signatures_and_summaries():
    source = '''N = 3  # how many

def f(x: int, *, y: str = "a") -> str:
    "What it does."

@dataclass
class D:
    "A value."
    a: int
    _b: int = 0
    @property
    def size(self) -> int: "How large."
    @classmethod
    def load(cls, path): "From a file."
    def _private(self): ...
'''
    n, f, d = defined(code(source))
    assert (n.kind, n.summary, n.line) == ("constant", "how many", 1)
    assert (f.signature, f.summary, f.line) == ("(x: int, *, y: str='a') -> str", "What it does.", 3) and argument_names(f) == {"x", "y"}
    assert (d.kind, d.signature) == ("class", "(a: int)")
    assert [(m.name, m.kind, m.signature) for m in d.methods] == [("D.size", "property", " -> int"), ("D.load", "method", "(path)")]


def test_only_what_is_certain_is_linked():
    chapters = list(notebooks(ROOT / "nbs").values())
    names = Names(ROOT / "qcal_nb", chapters)
    at = {b.url: b for b in chapters}
    def link(text, page="index.html"): return names.link(text, at[page])
    assert link("compare_schemes") == link("compare_schemes(model, texts)") == "scheme_comparison.html#def-compare_schemes"
    assert link("reset_quantization", "tutorials/c_outliers.html") == "../ledger.html#def-reset_quantization"
    assert link("ranges(run)") and link("ranges") is None and link("ranges", "analysis.html") == "#def-ranges"
    assert link("calibrate") is None  # the function, or the command?
    assert link("FORMAT") is None  # two modules have one
    assert link("eval_data") is None and link("x + 1") is None


def test_names_are_followed_home():
    names = Names(ROOT / "qcal_nb", list(notebooks(ROOT / "nbs").values()))
    assert names.home("", "calibrate").page == "pipelines.html" and names.home("records", "TensorStats").module == "qcal_nb.tensor_stats"
    assert names.home("observers", "Observer").url == "observers_base.html#def-Observer"
    assert [m.dotted for m in names.modules[:2]] == ["qcal_nb", "qcal_nb.observers"]


def test_a_chapter_that_no_row_names_is_an_error():
    table = Cell("a1", "markdown", "# top\n\n| chapter | what |\n| --- | --- |\n| [one](00_one.ipynb) | counts |", frozenset())
    def chapter(title, path): return book(Cell("a2", "markdown", f"# {title}", frozenset()), path=path)
    books = {"index.ipynb": book(table, path="index.ipynb"), "00_one.ipynb": chapter("one", "00_one.ipynb")}
    assert {label: [b.title for b in group] for label, group in grouped(books).items()} == {"Start": ["top"], "one": ["one"]}
    books["01_two.ipynb"] = chapter("two", "01_two.ipynb")
    with pytest.raises(ValueError, match="names 01_two.ipynb; every chapter needs a row"): grouped(books)


def test_the_copy_of_a_solution_is_dropped():
    words, other = Cell("a1", "markdown", "Why?\n```python\nx = 1\n```", frozenset()), Cell("a2", "markdown", "```python\nx = 1\n```", frozenset())
    drop_copies([words, code("x = 1", "a3", "solution"), other, code("x = 1", "a4")])
    assert words.text == "Why?\n" and "x = 1" in other.text


def test_directives_become_tags():
    raw = dict(id="a", cell_type="code", source="#| export\n#| echo: false\nx = 1\n", metadata=dict(tags=["solution"]), outputs=[])
    cell = read_cell(raw)
    assert cell.text == "x = 1" and cell.exported and cell.solution and "echo:false" in cell.tags


def test_a_name_without_a_chapter_leads_to_the_index(): assert Name("v", "constant", "", "", module="qcal_nb").url == "api.html#qcal_nb"
