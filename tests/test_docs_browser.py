"The site in Chromium, opened from its folder with the network off: it looks, folds and finds as it should."
import os
import re

import pytest
from conftest import ROOT
from test_docs import builder

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PAGES = ["index.html", "observers_imatrix.html", "tutorials/a_what_a_scale_is.html", "parity.html", "benchmarks.html", "api.html", "markup.html"]
LEFT = "net::ERR_ABORTED"  # what Chromium says of a picture that was still loading when the page was left; a missing one is ERR_FILE_NOT_FOUND


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return builder.docs(ROOT, tmp_path_factory.mktemp("site") / "_docs")


@pytest.fixture
def open_page(folder, browser):
    "`open_page(path)`: a tab without a network; what fails, is logged to the console or asks for more than files fails the test"
    contexts, wrong = [], []
    def opened(path, width=1440, scheme="light"):
        context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, offline=True)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.on("requestfailed", lambda r: wrong.append(f"{r.url}: {r.failure}") if r.failure != LEFT else None)
        page.on("console", lambda m: wrong.append(m.text))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        contexts.append(context)
        page.goto((folder / path).as_uri())
        return page
    yield opened
    for context in contexts: context.close()
    assert wrong == []


def ask(page, query):
    "Type into the search as one does, and wait for what it answers"
    page.keyboard.press("/")
    page.keyboard.type(query)
    page.wait_for_function("q => document.querySelector('.said').textContent.includes(`“${q}”`)", arg=query)
    return page.locator("#results [role=option]")


@pytest.mark.parametrize("path", PAGES)
def test_pages_open_offline(open_page, path):
    page = open_page(path)
    assert page.locator("h1").count() == 1 and page.locator("nav.chapters a[aria-current=page]").count() == 1
    assert page.evaluate("[...document.images].every(i => { i.loading = 'eager'; return true; })")
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    shots = os.environ.get("QCAL_SHOTS")
    if shots: page.screenshot(path=f"{shots}/docs-{path.replace('/', '-')}.png")


def test_no_page_is_wider_than_a_telephone(open_page, folder):
    page, wide = open_page("index.html", width=390), []
    for path in sorted(folder.rglob("*.html")):
        page.goto(path.as_uri())
        if page.evaluate("document.documentElement.scrollWidth") != 390: wide.append(path.name)
    assert wide == []
    page.get_by_text("Chapters", exact=True).click()
    assert page.locator("nav.chapters").is_visible()


def test_formulas_have_their_font(open_page):
    page = open_page("observers_imatrix.html")
    page.evaluate("document.fonts.ready.then(() => null)")
    assert page.evaluate("[...document.fonts].map(f => [f.family.replaceAll('\"', ''), f.status])") == [["STIX Two Math", "loaded"]]


def test_the_dark_scheme_is_dark(open_page):
    light, dark = (open_page("index.html", scheme=s).evaluate("getComputedStyle(document.body).backgroundColor") for s in ("light", "dark"))
    def brightness(color): return sum(map(int, re.findall(r"\d+", color)[:3]))
    assert brightness(light) > 700 and brightness(dark) < 120


def test_a_name_is_found_first_and_leads_to_its_definition(open_page):
    page = open_page("tutorials/c_outliers.html")
    found = ask(page, "calibrate")
    assert found.first.get_attribute("aria-selected") == "true" and "qcal_nb.pipelines" in found.first.inner_text()
    page.keyboard.press("Enter")
    page.wait_for_url("**/pipelines.html#def-calibrate")
    assert page.locator(":target").inner_text() == "calibrate" and page.locator(":target").is_visible()


def test_a_sentence_is_found(open_page):
    page = open_page("index.html")
    found = ask(page, "spends nearly half of its points where there is nothing")
    assert found.first.get_attribute("href").endswith("tutorials/a_what_a_scale_is.html#One-sided-data%2C-and-the-zero-point")


@pytest.mark.parametrize("query, name", [
    ("load_tiny", "load_tiny_llama"), ("tiny llama", "load_tiny_llama"), ("calibration record", "CalibrationRecord"),
    ("Workbench.from_record", "Workbench.from_record"), ("compare_shemes", "compare_schemes")])
def test_names_are_found_by_their_parts(open_page, query, name):
    assert name in [text.split()[0] for text in ask(open_page("index.html"), query).all_inner_texts()[:3]]


def test_search_by_keyboard(open_page):
    page = open_page("index.html")
    found = ask(page, "histogram")
    first = found.first.get_attribute("href")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert found.nth(2).get_attribute("aria-selected") == "true"
    page.keyboard.press("ArrowUp")
    assert found.nth(1).get_attribute("aria-selected") == "true"
    page.keyboard.press("Escape")
    assert not page.locator(".panel").is_visible() and page.locator(".search input").input_value() == "histogram"
    page.keyboard.press("Enter")  # shows the answers again and takes the first
    page.wait_for_url(first)


def test_no_result_says_so(open_page):
    page = open_page("api.html")
    assert ask(page, "xyzzyq").count() == 0 and "Nothing found" in page.locator(".said").inner_text()


def test_a_solution_shows_when_it_is_asked_for(open_page):
    page = open_page("tutorials/a_what_a_scale_is.html")
    fold = page.locator("article details").first
    assert not fold.locator(".highlight").is_visible()
    fold.locator("summary").click()
    assert fold.locator(".highlight").is_visible() and fold.locator("p").first.is_visible()
