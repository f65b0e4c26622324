"The site of `make docs`: every chapter, link, picture, formula and name; nothing from elsewhere; and how it is made."
import base64
import html
import importlib
import json
import pkgutil
import re
import shutil
import struct
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import names
import notebooks
import pytest
import toc

import qcal_nb
from qcal_nb.models import inject_outliers

ELSEWHERE = re.compile(r"(?i)^(https?:)?//")
VOID = "meta link img input br hr path circle line polyline rect col source wbr".split()


@dataclass
class Found(HTMLParser):
    "What a page holds: ids, links, files that it loads, text outside of code, text of folds, tags closed out of turn."
    ids: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    crooked: list[str] = field(default_factory=list)
    silent: int = 0  # pictures without words

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.append(attrs["id"])
        if tag == "a" and "href" in attrs: self.links.append(attrs["href"])
        if tag == "link" or "src" in attrs: self.loads.append(attrs.get("src") or attrs.get("href"))
        if tag == "img" and not attrs.get("alt"): self.silent += 1
        if tag == "details": self.folded.append("")
        if tag not in VOID: self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag in ("details", "section", "div") and self.stack[-1:] != [tag]: self.crooked.append(tag)
        while tag in self.stack and self.stack.pop() != tag: pass

    def handle_data(self, data):
        if "details" in self.stack: self.folded[-1] += data
        if not {"code", "pre", "script", "style", "annotation"} & set(self.stack): self.words.append(data)


@cache
def look(path: Path) -> Found:
    found = Found()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def pages(site): return sorted(site.rglob("*.html"))


@cache
def text_of(path): return html.unescape(re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8")))


def page_of(site, doc): return site / f"{doc}.html"


def broken(site):
    "Links, pictures, scripts and styles that lead nowhere, ids included."
    wrong = []
    for page in pages(site):
        for link in look(page).links + look(page).loads:
            if re.match(r"\w+:|//", link): continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            lost = anchor and target.suffix == ".html" and target.is_file() and anchor not in look(target).ids
            if not target.is_file() or lost: wrong.append((page.name, link))
    return wrong


def from_elsewhere(site):
    "What a page or a style sheet would load over a network; links that one clicks do not count."
    found = [(page.name, x) for page in pages(site) for x in look(page).loads if ELSEWHERE.match(x)]
    for page in [*pages(site), *site.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        styles = text if page.suffix == ".css" else "".join(re.findall(r"(?s)<style.*?</style>", text))
        loaded = re.findall(r"""(?:url\(|@import\s)\s*["']?([^"')\s]+)""", styles)
        found += [(page.name, x) for x in loaded if ELSEWHERE.match(x)]
    return found


def all_names():
    "Every public name as (module, name), from the modules as they are imported."
    for info in [None, *pkgutil.walk_packages(qcal_nb.__path__, "qcal_nb.")]:
        module = importlib.import_module(info.name) if info else qcal_nb
        yield from ((module.__name__, name) for name in getattr(module, "__all__", ()))


def sources():
    "(doc, markdown without code) of every notebook, as it is committed."
    for doc in toc.notebooks():
        prose = "\n\n".join(text for kind, text in toc.cells(doc) if kind == "markdown")
        yield doc, re.sub(r"(?s)```.*?```|`[^`]*`", "", prose)


def solutions():
    "(doc, code) of every cell that solves an exercise."
    for doc in toc.notebooks():
        cells = json.loads((toc.NBS / f"{doc}.ipynb").read_text(encoding="utf-8"))["cells"]
        yield from ((doc, "".join(c["source"])) for c in cells if "solution" in c["metadata"].get("tags", []))


# --- the whole site ---

@pytest.mark.slow
def test_a_page_for_each_notebook(site):
    assert all(page_of(site, doc).is_file() for doc in toc.notebooks())


@pytest.mark.slow
def test_every_link_and_picture_leads_somewhere(site): assert broken(site) == []


@pytest.mark.slow
def test_nothing_comes_from_elsewhere(site): assert from_elsewhere(site) == []


@pytest.mark.slow
def test_what_leads_nowhere_is_seen(site, tmp_path):
    shutil.copytree(site, tmp_path / "_docs")
    (tmp_path / "_docs" / "contents.html").rename(tmp_path / "_docs" / "elsewhere.html")
    bad = '<a href="search.html#nowhere"></a><script src="https://x.org/a.js"></script>'
    bad += "<style>a { background: url(//x.org/b.png) }</style>"
    (tmp_path / "_docs" / "bad.html").write_text(bad)
    assert {("index.html", "contents.html"), ("bad.html", "search.html#nowhere")} <= set(broken(tmp_path / "_docs"))
    assert from_elsewhere(tmp_path / "_docs") == [("bad.html", "https://x.org/a.js"), ("bad.html", "//x.org/b.png")]


@pytest.mark.slow
def test_ids_are_unique_and_folds_are_closed(site):
    for page in pages(site):
        assert len(look(page).ids) == len(set(look(page).ids)), page.name
        assert look(page).crooked == [], page.name


@pytest.mark.slow
def test_pictures_say_what_they_show(site):
    assert [page.name for page in pages(site) if look(page).silent] == []


@pytest.mark.slow
def test_next_leads_through_all_chapters(site):
    page, seen = site / "index.html", []
    while page:
        seen.append(page.relative_to(site).with_suffix("").as_posix())
        after = re.search(r'<a class="next-page" href="([^"]+)"', page.read_text(encoding="utf-8"))
        page = (page.parent / after[1]).resolve() if after else None
    assert [doc for doc in seen if doc != "contents" and not doc.startswith("api/")] == [c.doc for c in toc.chapters()]


@pytest.mark.slow
def test_pages_print_their_position_and_what_they_are(site):
    for chapter in toc.chapters()[1:]:
        text = " ".join(text_of(page_of(site, chapter.doc)).split())
        position = f"{chapter.part}, {chapter.place} ·" if chapter.place else f"{chapter.part} ·"
        assert f"{position}" in text and f"nbs/{chapter.doc}.ipynb" in text, chapter.doc
        assert (f"module {toc.module(chapter.doc)} ·" in text) == bool(toc.module(chapter.doc))
    assert toc.summary(chapter.doc).split("`")[0] in text_of(site / "contents.html")


@pytest.mark.slow
def test_formulas_are_drawn(site):
    drawn = {doc: page_of(site, doc).read_text(encoding="utf-8").count("<math") for doc in toc.notebooks()}
    written = {doc: len(re.findall(r"(?s)\$\$.+?\$\$|(?<![\\$])\$[^$\n]+\$", prose)) for doc, prose in sources()}
    assert sum(written.values()) > 200 and [doc for doc in written if drawn[doc] < written[doc]] == []
    for page in pages(site): assert not re.search(r"\$\$|\\[a-z]+\{|\|\s*---", "".join(look(page).words)), page.name


@pytest.mark.slow
def test_solutions_are_folded_with_their_words(site):
    found = list(solutions())
    assert len(found) > 20
    for doc, code in found:
        folds = [text for text in look(page_of(site, doc)).folded if text.strip().startswith("Solution")]
        assert sum(code in text for text in folds) == 1, (doc, code[:80])
        assert text_of(page_of(site, doc)).count(code) == 1, (doc, code[:80])


@pytest.mark.slow
def test_what_is_exported_is_folded_and_what_is_shown_is_not(site):
    folds = look(page_of(site, toc.modules()["qcal_nb.observers.base"])).folded
    assert any(text.strip().startswith("Source: ") and "class Observer(" in text for text in folds)
    assert not any("check_base_name(\"input\") ==" in text for text in folds)


@pytest.mark.slow
def test_what_no_reader_needs_is_gone(site):
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"^#\|", text_of(page), re.M) and "default_exp" not in text_of(page), page.name
        assert "\x1b" not in text and "Loading widget" not in text and not re.search(r"\d+%\|.*it/s\]", text), page.name


@pytest.mark.slow
def test_every_public_name_has_its_place_in_the_api(site):
    for module, name in all_names():
        page = look(site / "api" / f"{module}.html")
        if name == "__version__": continue
        assert f"{module}.{name}" in page.ids or any(link.endswith(f".{name}") for link in page.links), (module, name)


@pytest.mark.slow
def test_api_and_chapters_lead_to_each_other(site):
    doc = toc.modules()["qcal_nb.records.run"]
    api = look(site / "api" / "qcal_nb.records.run.html")
    assert f"../{doc}.html#def-record" in api.links and f"../{doc}.html" in api.links
    assert "../api/qcal_nb.records.run.html" in look(page_of(site, doc)).links
    assert any(link.endswith("api/qcal_nb.evaluate.schemes.html#qcal_nb.evaluate.schemes.compare_schemes")
               for doc in toc.notebooks() for link in look(page_of(site, doc)).links)  # a word in prose


@pytest.mark.slow
def test_a_type_of_python_is_no_property_of_ours(site):
    for page in set((site / "api").glob("qcal_nb.*.html")) - set((site / "api").glob("qcal_nb.evaluate.*")):
        ours = [link for link in look(page).links if link.endswith((".Allocation.bytes", ".Spared.bytes"))]
        assert ours == [], page.name


@pytest.mark.slow
def test_comments_describe_parameters(site):
    text = " ".join(text_of(site / "api" / "qcal_nb.models.outliers.html").split())
    assert "Parameters:" in text
    said = names.parameters(inject_outliers)
    assert len(said) > 2 and all(words.replace("`", "").replace("...", "…") in text for words in said.values())


@pytest.mark.slow
def test_no_page_has_an_address_in_memory(site):
    for page in (site / "api").iterdir(): assert " at 0x" not in text_of(page), page.name


def test_pages_are_made_the_same_way_twice():
    once, again = ([json.dumps(notebooks.page(doc)) for doc in ("index", "parity")] for _ in range(2))
    assert once == again


# --- its parts ---

def test_a_file_that_the_site_lacks_is_named():
    assert notebooks.without_files("see [Where?](../CONTRIBUTING.md#where) and [x](a.ipynb)") == (
        "see Where? (`CONTRIBUTING.md`) and [x](a.ipynb)"
    )


def code(source, *tags, outputs=()):
    return dict(cell_type="code", source=source, metadata=dict(tags=list(tags)), outputs=list(outputs))


def shown(*cells): return notebooks.pages_cells(list(cells), Path("."))


def test_directives_are_understood():
    assert shown(code("#| hide\nx = 1"), code("#| default_exp models"), code("#| include: false\nx")) == []
    quiet, = shown(code("#| echo: false\nx", outputs=[dict(output_type="stream", name="stdout", text="1")]))
    assert quiet["metadata"]["tags"] == ["remove-input"] and quiet["source"] == "x"
    plain, = shown(code("#| eval: false\nx = 1\n"))
    assert plain["source"] == "x = 1" and "tags" not in plain["metadata"]


def test_an_exported_cell_is_folded_and_has_anchors():
    anchors, cell = shown(code("#| export\ndef f(x): return x\n_a = 1\nA, B = 1, 2"))
    assert re.findall(r'id="([^"]+)"', anchors["source"]) == ["def-f", "def-A", "def-B"]
    assert cell["metadata"]["tags"] == ["hide-input"]
    assert cell["metadata"]["mystnb"]["code_prompt_show"] == "Source: f, A, B"
    assert notebooks.defined("%timeit x") == [] and notebooks.defined("import a") == []


def test_the_fold_of_a_solution_holds_words_and_code():
    words = "Why?\n\n<details><summary>Solution</summary>\n\nBecause.\n\n```python\nx = 1\n```\n\n</details>"
    cells = [code("x = 1", "solution"), code("y = 2", "solution"), notebooks.markdown("Next.")]
    found = shown(notebooks.markdown(words), *cells)
    assert [c["source"].strip() for c in found] == [words.split("\n\n```")[0], "x = 1", "y = 2", "</details>", "Next."]
    bare = shown(notebooks.markdown("Why?"), code("x = 1", "solution"))
    assert bare[0]["source"].strip().endswith(notebooks.FOLD) and bare[-1]["source"] == "</details>"


def test_terminal_text():
    assert notebooks.terminal("\x1b[31mred\x1b[0m\n 50%|##  | 1/2 [00:01<00:01]\nold\rnew\n") == "red\nnew\n"


def test_pictures_have_words_and_a_size():
    assert notebooks.alt('ax.set_title("Ranges")', "s") == "Picture: Ranges"
    assert notebooks.alt("plot_ranges(run)", "s") == "Picture: plot_ranges"
    assert notebooks.alt("x", "Two") == "Picture of the section “Two”"
    head = b"\x89PNG\r\n\x1a\n" + bytes(8) + struct.pack(">II", 400, 200)
    dense = head + b"pHYs" + struct.pack(">I", round(200 / 0.0254))
    assert notebooks.inches(head) == 400 and notebooks.inches(dense) == 200
    data = {"image/png": base64.b64encode(dense).decode(), "text/plain": "VBox(children=())"}
    picture = dict(output_type="display_data", metadata={}, data=data)
    cell, note = shown(code("wb", outputs=[picture]))
    assert cell["outputs"][0]["metadata"] == {"image/png": dict(width=200)} and note["source"] == notebooks.LIVE


def test_a_dark_picture_beside_a_light_one_is_shown_in_the_dark(tmp_path):
    (tmp_path / "a-dark.png").touch()
    both = "![x](a.png){.only-light} ![x](a-dark.png){.only-dark}"
    assert notebooks.with_dark("![x](a.png) ![y](b.png)", tmp_path) == f"{both} ![y](b.png)"


def test_names_are_followed_home():
    own, others = names.members("qcal_nb.observers")
    assert own == [] and dict(others)["Observer"] == "qcal_nb.observers.base"
    assert dict(others)["BASE_NAMES"] == "qcal_nb.observers.flatten"
    own, others = names.members("qcal_nb.records")
    assert own == [] and dict(others)["record"] == "qcal_nb.records.run"
    own, others = names.members("qcal_nb.workbench")
    assert own == [] and dict(others)["Workbench"] == "qcal_nb.widgets.workbench"


def test_only_what_is_certain_is_linked():
    def sure(text): return names.sure(re.fullmatch(r"([A-Za-z_]\w*(?:\.\w+)?)(\(.*\))?", text))
    assert sure("compare_schemes") and sure("ranges(run)") and sure("Workbench") and not sure("ranges")
    assert "eval_data" in names.arguments() and "compare_schemes" not in names.arguments()


def test_stars_and_bars_are_only_signs():
    assert names.escaped("`a|b` and a|b, *x*") == r"`a|b` and a\|b, \*x\*"


def test_a_formula_that_cannot_be_shown_is_a_warning(monkeypatch):
    import formulas
    from docutils import nodes
    said = []
    monkeypatch.setattr(formulas.LOGGER, "warning", lambda text, *args, **kwargs: said.append(text % args))
    assert formulas.mathml(nodes.math("", r"\foo x"), False) == "" and r"\\foo x" in said[0]
    assert formulas.mathml(nodes.math("", "x^2"), False).startswith("<math") and len(said) == 1
