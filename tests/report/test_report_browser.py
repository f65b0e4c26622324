"""The report in Chromium: its tables work offline, and it asks nothing of a network."""
import os
import re
from pathlib import Path

import pytest

from qcal_nb.analysis import ranges
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.records import record
from qcal_nb.report import to_html
from tests.report.samples import EVIL, odd_record

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a report from disk, offline; afterwards nothing may have been asked of a network, and no error may have
    occurred."""
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
        const seen = [...t.tBodies[0].rows].filter(r => r.offsetParent !== null);
        return seen.map(r => r.cells[i].textContent); }""", [name, column])


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
    assert set(shown(page, "ranges", "module")) == {m for m, b in run.readers if "layers.1.mlp" in m and b == "input"}
    assert page.locator("#ranges output").inner_text() == f"2 of {len(run.readers)} rows"
    page.locator("#ranges input").fill("no such thing")
    assert shown(page, "ranges", "module") == [] and page.locator("#ranges output").inner_text().startswith("0 of")
    page.locator("#ranges input").fill("")
    assert len(shown(page, "ranges", "module")) == len(run.readers) < len(shown(page, "observers", "module"))
    page.locator("#ranges .scroll").focus()


def test_empty_cells_stay_last(opened, run, page):
    page = opened(page)
    button = page.locator("#observers th button", has_text=re.compile("^sqnr_db$"))
    for _ in range(2):
        button.click()
        cells = shown(page, "observers", "sqnr_db")
        filled = [c for c in cells if c]
        assert filled and "" in cells and cells[:len(filled)] == filled
        assert [float(c) for c in filled] in (sorted(map(float, filled)), sorted(map(float, filled), reverse=True))


def test_names_that_are_html_do_nothing(opened, tmp_path):
    page = opened(to_html(odd_record(), tmp_path / "odd.html", title=EVIL))
    assert page.evaluate("window.broken") is None and page.locator("h1").inner_text() == EVIL
    assert page.locator("#ranges img").count() == 0 and EVIL in shown(page, "ranges", "module")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(opened, scheme, tmp_path):
    model, tokenizer = load_tiny_llama()
    run = record(model, calibration_texts()[:4], scheme="FP8", tokenizer=tokenizer, max_length=128, progress=False)
    page = opened(to_html(run, tmp_path / "report.html"), scheme)
    ground, ink = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        ".map(c => c.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3)"
    )
    assert abs(ground - ink) > 150 and (ground > ink) == (scheme == "light")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")      # nothing sticks out sideways
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    if folder := os.environ.get("QCAL_SHOTS"):
        page.screenshot(path=Path(folder) / f"report-{scheme}.png", full_page=True)
