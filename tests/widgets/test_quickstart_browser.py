"""The quickstart in JupyterLab in Chromium: what is on the page is what the kernel holds, after every click."""
import os
import re
import time
from pathlib import Path

import pytest

from tests.widgets.page import KERNEL, ask, click, picture, until

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SECONDS = 180_000

ROWS = "table => Array.from(table.rows).slice(1).map(r => Array.from(r.cells).map(c => c.innerText))"

SETUP = """
import hashlib, json, torch
from qcal_nb.widgets.html import changes_table
def _digest():
    "Bits of all weights, and of the logits on a fixed text."
    bits = hashlib.sha256()
    for name, p in sorted(wb.session.model.named_parameters()):
        bits.update(name.encode() + p.detach().contiguous().view(torch.uint8).numpy().tobytes())
    ids = tokenizer("def f(x): return x", return_tensors="pt").input_ids
    with torch.no_grad(): logits = wb.session.model(ids).logits
    return [bits.hexdigest(), hashlib.sha256(logits.numpy().tobytes()).hexdigest()]
def _ranges(base_name="input"):
    return [[wb.record[key].min, wb.record[key].max] for key in wb.record.readers if key[1] == base_name]
_ids = {n: id(p) for n, p in wb.session.model.named_parameters()}
"""


def changes_on_page(page):
    table = page.locator(".qcal-changes table")
    return table.evaluate(ROWS) if table.count() else []


def changes_in_kernel(page):
    return ask(page, "changes_table(wb.session.changes).astype(str).values.tolist()")


def drawn(page, key="range", held="_ranges()", seconds=60):
    """What the picture holds under `key`, once it is what the kernel holds. Pictures follow a step a moment later than
    its labels."""
    deadline = time.monotonic() + seconds
    while picture(page).get(key) != ask(page, held) and time.monotonic() < deadline: time.sleep(0.2)
    assert picture(page)[key] == ask(page, held)
    return picture(page)[key]


def test_from_initialize_to_reset(open_nb, request):
    page = open_nb("index.ipynb", run=False, viewport=(1400, 2200))
    from playwright.sync_api import expect
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    expect(page.locator("button.qcal-initialize")).to_be_visible(timeout=SECONDS)
    assert page.evaluate(KERNEL, SETUP)["error"] is None
    start, n = ask(page, "_digest()"), ask(page, "len(texts)")
    expect(page.locator(".qcal-matches table")).to_have_count(1)

    click(page, "initialize", "initialized")
    rows = changes_on_page(page)
    assert rows == changes_in_kernel(page) and len([r for r in rows if r[1] == "original → initialized"]) == 28
    assert picture(page) == {}  # nothing was seen yet

    click(page, "start", "started")
    assert changes_on_page(page) == changes_in_kernel(page)
    assert all("+input_observer" in row[2] and row[3] == "+1" for row in changes_on_page(page))

    click(page, "feed-all", "fed")
    expect(page.locator(".qcal-note")).to_contain_text(f"{n} of {n} batches")
    assert len(drawn(page)) == 16  # a row for q, k and v, and one for gate and up
    assert ask(page, "wb.record.batches") == n and "clip_max" not in picture(page)
    shot(page, request, "fed")

    click(page, "end", "ended")
    rows = changes_on_page(page)
    assert rows == changes_in_kernel(page) and all(row[5] == "input_scale, weight_scale" for row in rows)
    inputs = "wb.scales().query('base_name == \"input\"').set_index('module').clip_max"
    rows = "[name for name, base_name in wb.record.readers if base_name == 'input']"
    assert len(drawn(page, "clip_max", f"{inputs}[{rows}].tolist()")) == 16
    assert ask(page, "_digest()")[1] != start[1]  # fake quantization is on
    shot(page, request, "ended")

    click(page, "reset", "original")
    assert ask(page, "_digest()") == start
    assert ask(page, "_ids == {n: id(p) for n, p in wb.session.model.named_parameters()}")
    assert changes_on_page(page) == changes_in_kernel(page)
    assert len(drawn(page)) == 16  # the record is kept
    assert not page.console_errors


def shot(page, request, name):
    "A screenshot for people: into $QCAL_SHOTS, or else where the test's temporary files are."
    folder = Path(os.environ.get("QCAL_SHOTS") or request.config._tmp_path_factory.getbasetemp())
    page.locator(".qcal-workbench").first.screenshot(path=folder / f"workbench-{name}.png")


def test_back_filter_select_and_errors(open_nb):
    from playwright.sync_api import expect
    page = open_nb("index.ipynb", viewport=(1400, 2200))
    assert page.evaluate(KERNEL, SETUP)["error"] is None
    click(page, "initialize", "initialized")
    click(page, "start", "started")
    click(page, "feed", "fed")
    one = ask(page, "_ranges()")
    click(page, "feed-all", "fed")
    assert drawn(page) != one
    click(page, "back", "fed")
    deadline = time.monotonic() + 20
    while ask(page, "_ranges()") != one and time.monotonic() < deadline: time.sleep(0.2)
    assert drawn(page) == one

    page.locator(".qcal-range-pattern input").fill("down_proj")
    page.locator(".qcal-range-pattern input").press("Enter")
    until(page, "len(wb.explorer.shown)", 4)
    expect(page.locator(".qcal-range-table tr")).to_have_count(5)
    drawn(page, held="wb.explorer.shown[['min', 'max']].values.tolist()")

    image = page.locator("img.qcal-picture").first
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    left, width = ask(page, "[wb.explorer._ax.get_position().x0, wb.explorer._ax.get_position().width]")
    x = box["x"] + box["width"] * (left + width * (2 + 0.8) / 4.6)  # the third of four bars
    page.mouse.move(x, box["y"] + box["height"] / 2)
    until(
        page, "wb.explorer.picture.hint.split()[0] if wb.explorer.picture.hint else ''", "model.layers.2.mlp.down_proj"
    )
    page.mouse.click(x, box["y"] + box["height"] / 2)
    until(page, "wb.selected", "model.layers.2.mlp.down_proj")
    expect(page.locator(".qcal-range-numbers")).to_contain_text("model.layers.2.mlp.down_proj")

    page.locator(".qcal-range-pattern input").fill("(")
    page.locator(".qcal-range-pattern input").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("not a regular expression")
    for phase in ("started", "initialized", "original"): click(page, "back", phase)
    assert ask(page, "wb.session.history") == []
    assert not page.console_errors


def test_an_error_in_the_data_is_shown_and_the_workbench_goes_on(open_nb):
    from playwright.sync_api import expect
    page = open_nb("index.ipynb", viewport=(1400, 2200))
    bad = "wb.session.stream._kept[:] = [wb.session.stream.get(0), {'input_ids': torch.tensor([[99999]])}]"
    assert page.evaluate(KERNEL, SETUP + bad)["error"] is None
    click(page, "initialize", "initialized")
    click(page, "start", "started")
    click(page, "feed-all", "fed")
    expect(page.get_by_role("alert")).to_contain_text(re.compile("input_ids go from .*while feeding batch 1", re.S))
    assert ask(page, "[wb.session.fed, wb.record.batches]") == [1, 1]
    click(page, "end", "ended")
    expect(page.get_by_role("alert")).to_have_count(0)
