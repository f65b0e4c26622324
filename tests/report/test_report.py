"""The report: what stands in the file, that nothing in it points outside or runs, and that its tables work in a browser."""
import html
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from qcal_nb.analysis import compare_observers, coverage, ranges
from qcal_nb.calibration_record import About
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.plot_choices import observer_to_draw
from qcal_nb.plots import data_of
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.report import CLOSE_UPS, cell, to_html
from qcal_nb.tensor_stats import TensorStats, measure
from helpers import make_batches, make_model

EVIL = "<script>window.broken = true</script><img src=x onerror='window.broken = true'>\"'&"


class Reader(HTMLParser):
    "Tables as lists of rows by id, links, and text outside of script and style."

    def __init__(self, text):
        super().__init__()
        self.tables, self.links, self.tags, self.text, self.policy = {}, [], [], "", ""
        self._id = self._cell = self._raw = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag in ("script", "style"): self._raw = tag
        if tag == "section": self._id = attrs.get("id")
        if tag == "tr": self.tables.setdefault(self._id, []).append([])
        if tag in ("td", "th"): self._cell = ""
        if attrs.get("http-equiv") == "Content-Security-Policy": self.policy = attrs["content"]
        self.links += [attrs[k] for k in ("src", "href", "action", "poster", "data", "srcset") if k in attrs]

    def handle_endtag(self, tag):
        if tag == self._raw: self._raw = None
        if tag in ("td", "th"):
            self.tables[self._id][-1].append(self._cell)
            self._cell = None

    def handle_data(self, data):
        if self._raw: return
        self.text += data
        if self._cell is not None: self._cell += data


def read(path): return Reader(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run():
    return record(make_model("llama_gqa"), make_batches(4), scheme="INT8_STATIC", observers=["static_minmax", "mse"], progress=False)


@pytest.fixture(scope="module")
def page(run, tmp_path_factory): return to_html(run, tmp_path_factory.mktemp("report") / "report.html", title="A & B")


def odd_record():
    "NaN, a tensor that nobody saw, zeros, an expert without tokens, and names and texts that are HTML."
    x = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    loud = measure(x, batch=0)
    loud = replace(loud, top=tuple(replace(e, token=EVIL, context=EVIL) for e in loud.top))
    tensors = {(EVIL, "input"): loud, ("broken", "input"): measure(torch.tensor([[1.0, torch.nan, torch.inf, 2.0]]), 0),
               ("never", "input"): TensorStats(), ("zeros", "input"): measure(torch.zeros(2, 4), 0)}
    types = {name: EVIL for name, _ in tensors}
    return CalibrationRecord(tensors, types, about=About(model=EVIL, name=EVIL), spans=((0, 1),), level_tokens={0: 4},
            expert_tokens={"layers.0.experts.3": 0})


def test_tables_are_those_of_the_analysis(run, page):
    tables = read(page).tables
    for name, wanted in dict(ranges=ranges(run), observers=compare_observers(run), coverage=coverage(run)).items():
        assert tables[name][0] == list(wanted.columns)
        assert tables[name][1:] == [[html.unescape(cell(v)) for v in row] for row in wanted.astype(object).values.tolist()], name
    assert set(tables) == {"ranges", "observers", "extremes", "outlier-channels", "coverage", "convergence"}
    assert len(tables["convergence"]) == 1 + sum(b == "input" for _, b in run.tensors)


def test_pictures_carry_their_numbers(run, page):
    import base64
    pictures = [attrs for tag, attrs in read(page).tags if tag == "img"]
    data = [data_of(base64.b64decode(p["src"].partition(",")[2])) for p in pictures]
    table = ranges(run)
    for base_name in ("input", "weight"): assert table[table.base_name == base_name][["min", "max"]].values.tolist() in [d.get("range") for d in data]
    assert all(len(p["alt"]) > 10 for p in pictures) and len(pictures) >= 5 + 3 * 1


def test_the_top_says_what_was_run(run, page):
    text = read(page).text
    for fact in ("A & B", "LlamaForCausalLM", "int8", "4 batches, 128 tokens", "static_minmax, mse", f"torch {run.about.versions['torch']}"):
        assert fact in text
    assert "Nothing is wrong" in text and "pieces of the calibration text" not in text


def test_nothing_points_outside(page):
    found = read(page)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in found.links)
    assert "default-src 'none'" in found.policy and "unsafe" not in found.policy and "http" not in found.policy
    text = Path(page).read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttp|WebSocket|import\(", text)
    assert not [t for t, _ in found.tags if t in ("link", "iframe", "object", "embed", "form", "base")]
    ids = {attrs["id"] for _, attrs in found.tags if "id" in attrs}
    assert {link[1:] for link in found.links if link.startswith("#")} <= ids


def test_what_is_wrong_stands_first(tmp_path):
    found = read(to_html(odd_record(), tmp_path / "odd.html"))
    head = found.text[:found.text.index("Findings")]
    for words in ("pieces of the calibration text", "broken (input): 1 NaN, 1 infinite, the first nan at (0, 1) of batch 0",
                  "Never seen: 1 tensor", "never (input)", "layers.0.experts.3"): assert words in head, words


def test_scales_at_eps_are_reported(tmp_path):
    model = make_model("llama_gqa")
    with torch.no_grad(): model.model.layers[0].self_attn.k_proj.weight[1] = 0
    seen = record(model, None, scheme="FP8_DYNAMIC", observers=["memoryless_minmax"], base_names=["weight"], progress=False)
    text = read(to_html(seen, tmp_path / "eps.html")).text
    assert re.search(r"at eps \(all values were zero\): 1\.\s*model\.layers\.0\.self_attn\.k_proj \(weight\): 1 of 32, memoryless_minmax", text)


def test_ranges_and_scales_are_those_of_the_recipe(tmp_path):
    recipe = QuantizationModifier(scheme="INT8_STATIC", input_observer="mse", ignore=["lm_head"])
    text = read(to_html(record(make_model("llama_gqa"), make_batches(2), scheme=recipe, progress=False), tmp_path / "mse.html")).text
    assert re.findall(r"The black marks are the range that (\w+) chose", text) == ["mse", "memoryless_minmax"]  # of inputs, of weights
    assert "scales that mse chose for inputs" in text


def test_keys_are_drawn_as_the_cache_will_hold_them():
    recipe = QuantizationModifier(targets=[], kv_cache_scheme=dict(num_bits=8, type="float", strategy="tensor", symmetric=True, observer="mse"))
    seen = record(make_model("llama_gqa"), make_batches(2), scheme=recipe, base_names=["k"], progress=False)
    assert seen.observers == ["static_minmax", "mse"] and observer_to_draw(seen, "k") == "mse"


def test_html_in_names_and_tokens_is_text(tmp_path):
    found = read(to_html(odd_record(), tmp_path / "odd.html", title=EVIL))
    assert [t for t, _ in found.tags].count("script") == 1 and all(a.get("src", "data:").startswith("data:") for _, a in found.tags)
    assert not [a for _, attrs in found.tags for a in attrs if a.startswith("on")]
    assert EVIL in {row[0] for row in found.tables["ranges"]} and EVIL in {c for row in found.tables["extremes"] for c in row}


def test_text_is_left_out_where_the_record_holds_none(run, page): assert not {"token", "context"} & set(read(page).tables["extremes"][0])


def test_an_empty_record(tmp_path):
    found = read(to_html(CalibrationRecord(), tmp_path / "empty.html"))
    assert "Nothing was recorded." in found.text and "0 batches" in found.text and all(len(rows) == 1 for rows in found.tables.values())


def test_writing(run, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(TypeError, match="record must be a CalibrationRecord"): to_html("record", path)
    assert path.read_text() == "before"
    assert to_html(CalibrationRecord(), str(path)) == path and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError): to_html(CalibrationRecord(), tmp_path / "no" / "report.html")


def test_a_thousand_tensors_have_no_more_pictures(tmp_path):
    bell = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    stats = [measure(bell * (1 + i), 0) for i in range(20)]
    names = [f"model.layers.{i // 7}.m{i % 7}" for i in range(1000)]
    many = CalibrationRecord({(n, "input"): stats[i % 20] for i, n in enumerate(names)}, dict.fromkeys(names, "Linear"), spans=((0, 1),),
            level_tokens={0: 20})
    path = to_html(many, tmp_path / "many.html")
    found = read(path)
    assert len(found.tables["ranges"]) == 1001 and len(found.tables["observers"]) == 4001
    assert sum(t == "img" for t, _ in found.tags) <= 5 + 3 * CLOSE_UPS and path.stat().st_size < 8e6


# --- in the browser ---

@pytest.fixture
def opened(browser, tmp_path):
    "Opens a report from disk, offline; afterwards nothing may have been asked of a network, and no error may have occurred."
    pages = []
    def open_report(path, scheme="light"):
        context = browser.new_context(color_scheme=scheme, viewport=dict(width=1200, height=900), offline=True)
        page = context.new_page()
        page.asked, page.complaints = [], []
        page.on("request", lambda r: page.asked.append(r.url) if not r.url.startswith("data:") else None)
        page.on("console", lambda m: page.complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: page.complaints.append(str(e)))
        page.goto(Path(path).as_uri())
        pages.append(page)
        return page
    yield open_report
    for page in pages:
        assert page.asked == [page.url.partition("#")[0]] and page.complaints == []
        page.context.close()


def shown(page, name, column):
    "The texts of a column's visible cells, from top to bottom."
    return page.evaluate("""([name, column]) => { const t = document.querySelector(`#${name} table`);
        const i = [...t.tHead.rows[0].cells].findIndex(c => c.textContent === column);
        return [...t.tBodies[0].rows].filter(r => r.offsetParent !== null).map(r => r.cells[i].textContent); }""", [name, column])


@pytest.mark.browser
@pytest.mark.slow
def test_sorting_and_filtering(opened, run, page):
    page = opened(page)
    order = shown(page, "ranges", "module")
    head = page.locator("#ranges th", has=page.get_by_role("button", name="absmax", exact=True))
    for direction, sign in (("ascending", 1), ("descending", -1)):
        head.locator("button").click()
        sizes = [float(v) for v in shown(page, "ranges", "absmax")]
        assert sizes == sorted(sizes, key=lambda v: sign * v) and head.get_attribute("aria-sort") == direction
    assert page.locator("#ranges th[aria-sort=none]").count() == len(ranges(run).columns) - 1
    assert sorted(shown(page, "ranges", "module")) == sorted(order) and shown(page, "coverage", "module") != []
    page.locator("#ranges th button", has_text=re.compile("^module$")).focus()
    page.keyboard.press("Enter")
    natural = shown(page, "ranges", "module")
    assert natural != order or natural == sorted(natural)
    page.locator("#ranges input").fill("layers.1 mlp INPUT")
    assert set(shown(page, "ranges", "module")) == {m for m, b in run.tensors if "layers.1.mlp" in m and b == "input"}
    assert page.locator("#ranges output").inner_text() == f"3 of {len(run)} rows"
    page.locator("#ranges input").fill("no such thing")
    assert shown(page, "ranges", "module") == [] and page.locator("#ranges output").inner_text().startswith("0 of")
    page.locator("#ranges input").fill("")
    assert len(shown(page, "ranges", "module")) == len(run) and len(shown(page, "observers", "module")) > len(run)
    page.locator("#ranges .scroll").focus()


@pytest.mark.browser
@pytest.mark.slow
def test_empty_cells_stay_last(opened, run, page):
    page = opened(page)
    button = page.locator("#observers th button", has_text=re.compile("^sqnr_db$"))
    for _ in range(2):
        button.click()
        cells = shown(page, "observers", "sqnr_db")
        filled = [c for c in cells if c]
        assert filled and "" in cells and cells[:len(filled)] == filled
        assert [float(c) for c in filled] in (sorted(map(float, filled)), sorted(map(float, filled), reverse=True))


@pytest.mark.browser
@pytest.mark.slow
def test_names_that_are_html_do_nothing(opened, tmp_path):
    page = opened(to_html(odd_record(), tmp_path / "odd.html", title=EVIL))
    assert page.evaluate("window.broken") is None and page.locator("h1").inner_text() == EVIL
    assert page.locator("#ranges img").count() == 0 and EVIL in shown(page, "ranges", "module")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(opened, scheme, tmp_path):
    model, tokenizer = load_tiny_llama()
    run = record(model, calibration_texts()[:4], scheme="FP8", tokenizer=tokenizer, max_length=128, progress=False)
    page = opened(to_html(run, tmp_path / "report.html"), scheme)
    ground, ink = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
                                ".map(c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3)")
    assert abs(ground - ink) > 150 and (ground > ink) == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")      # nothing sticks out sideways
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    if folder := os.environ.get("QCAL_SHOTS"): page.screenshot(path=Path(folder) / f"report-{scheme}.png", full_page=True)
