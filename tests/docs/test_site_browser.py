"The site in Chromium, opened from its folder with the network off: it looks, folds and finds as it should."
import os
import re

import pytest
import toc

pytestmark = [pytest.mark.browser, pytest.mark.slow]
LEFT = "net::ERR_ABORTED"  # a picture was still loading when its page was left; a missing one is ERR_FILE_NOT_FOUND
WALK = toc.parts()[1]["chapters"][0]
MODULES = toc.modules()
CHAPTER = MODULES["qcal_nb.observers.imatrix"]
PAGES = ["index", WALK, CHAPTER, toc.chapters()[-1].doc, "api/qcal_nb.records", "api/index", "contents"]


@pytest.fixture
def open_page(site, browser):
    "`open_page(path)`: a tab without a network; it may ask for files alone, and have nothing to complain about"
    contexts, wrong = [], []

    def opened(path, width=1400, scheme="light"):
        context = browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme, offline=True)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.on("requestfailed", lambda r: wrong.append(f"{r.url}: {r.failure}") if r.failure != LEFT else None)
        page.on("console", lambda m: wrong.append(m.text) if not m.text.startswith("Changed to ") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        contexts.append(context)
        page.goto((site / path).as_uri())
        return page

    yield opened
    for context in contexts: context.close()
    assert wrong == []


def brightness(page):
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3]))


def results(page, query):
    "Type into the search of the sidebar as one does; the addresses of what it finds, best first."
    page.locator(".sidebar-search").fill(query)
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?*")
    page.wait_for_function("document.querySelector('#search-results h2')?.textContent.startsWith('Search R')")
    links = page.locator("#search-results ul.search li a")
    return links.evaluate_all("links => links.map(a => a.getAttribute('href'))")


@pytest.mark.parametrize("path", PAGES)
def test_pages_open_offline(open_page, path):
    page = open_page(f"{path}.html")
    assert page.locator("h1").count() == 1 and page.locator(".sidebar-tree .current-page").count() == 1
    assert page.evaluate("[...document.images].every(i => { i.loading = 'eager'; return true; })")
    page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    shots = os.environ.get("QCAL_SHOTS")
    if shots: page.screenshot(path=f"{shots}/docs-{path.replace('/', '-')}.png")


@pytest.mark.parametrize("width", [1400, 800, 420])
def test_no_page_scrolls_sideways(open_page, site, width):
    page, wide = open_page("index.html", width=width), []
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri(), wait_until="domcontentloaded")
        page.evaluate("document.querySelectorAll('article details').forEach(fold => fold.open = true)")
        if page.evaluate("document.documentElement.scrollWidth") != width: wide.append(path.name)
    assert wide == []


def test_formulas_have_their_font(open_page):
    page = open_page(f"{WALK}.html")
    page.evaluate("document.fonts.ready.then(() => null)")
    fonts = page.evaluate("[...document.fonts].map(f => [f.family.replaceAll('\"', ''), f.status])")
    assert fonts == [["STIX Two Math", "loaded"]]


def test_the_dark_scheme_is_dark_and_pictures_are_turned(open_page):
    chapter = f"{MODULES['qcal_nb.plots.model']}.html"
    light, dark = open_page(chapter), open_page(chapter, scheme="dark")
    assert brightness(light) > 700 and brightness(dark) < 120
    filters = [page.locator("article img").first.evaluate("i => getComputedStyle(i).filter") for page in (light, dark)]
    assert filters[0] == "none" and filters[1].startswith("invert")


def test_the_theme_is_switched(open_page):
    page = open_page("index.html")
    before = brightness(page)
    page.locator(".content-icon-container .theme-toggle").click()
    assert page.locator("body").get_attribute("data-theme") == "dark" and brightness(page) < 120 < before


def test_a_walkthrough_is_found_first(open_page):
    found = results(open_page(f"{WALK}.html"), "scale")
    assert found[0].split("#")[0].endswith(f"{WALK}.html")
    walks = [f"{doc}.html" for doc in toc.notebooks() if doc.startswith("tutorials/")]
    assert all(any(walk in link for walk in walks) for link in found[:8]) and len(found) > 20


def test_a_name_is_found(open_page):
    found = results(open_page("index.html"), "compare_schemes")
    assert any(link.endswith("#qcal_nb.evaluate.schemes.compare_schemes") for link in found[:12])


def test_no_result_says_so(open_page):
    page = open_page("api/index.html")
    assert results(page, "xyzzyq") == []
    assert "did not match any documents" in page.locator("#search-results").inner_text()


def test_a_solution_shows_when_it_is_asked_for(open_page):
    page = open_page(f"{WALK}.html")
    fold = page.locator("article details", has_text="Solution").first
    assert not fold.locator(".highlight").first.is_visible()
    fold.locator("summary").click()
    assert fold.locator(".highlight").first.is_visible() and fold.locator("p").first.is_visible()


def test_source_opens_and_code_can_be_copied(open_page):
    page = open_page(f"{MODULES['qcal_nb.observers.base']}.html")
    fold = page.locator("article details", has_text="class Observer(").first
    assert fold.locator("summary").inner_text().startswith("Source: ") and not fold.locator(".highlight").is_visible()
    fold.locator("summary").click()
    assert fold.locator(".highlight").is_visible()
    assert page.locator("button.copybtn").count() > 10
