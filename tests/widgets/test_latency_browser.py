"""How fast the workbench feels: from a click in Chromium until the new picture is on the page, and the kernel's part.
Prints, asserts no time.

`make latency` prints the table: on the embedded model, and on a made-up record of 1,000 tensors.
"""
import os
import statistics

import pytest

from tests.widgets.page import KERNEL, ask, tab, until

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ROUNDS = int(os.environ.get("QCAL_ROUNDS", "2"))   # nothing is asserted of times: `make latency` asks for more

WATCH = """() => {
  const visible = () => [...document.querySelectorAll('img.qcal-picture')].find(i => i.offsetParent !== null);
  window.next_picture = () => { const img = visible(), src = img.src, t0 = performance.now();
    return new Promise((done, fail) => { const look = () => { const now = visible();
      if (now && now.src !== src && now.complete) requestAnimationFrame(() => done(performance.now() - t0));
      else if (performance.now() - t0 > 60000) fail('no new picture');
      else requestAnimationFrame(look); }; look(); }); };
}"""
THOUSAND = """
import torch, time
from qcal_nb import Workbench
from qcal_nb.records import CalibrationRecord
from qcal_nb.stats import measure
_names = [f"model.layers.{i // 7}.m{i % 7}" for i in range(500)]
_bell = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
_stats = [
    (measure(_bell * (1 + i % 5 + 20 * (i == 77)), 0), measure(_bell.T.contiguous() * 0.02, None)) for i in range(20)
]
_tensors = {(n, b): _stats[i % 20][j] for i, n in enumerate(_names) for j, b in enumerate(("input", "weight"))}
_record = CalibrationRecord(_tensors, dict.fromkeys(_names, "Linear"), spans=((0, 1),), level_tokens={0: 400})
wb.close()
wb = Workbench.from_record(_record)
display(wb)
"""
TIMED = """
import time
_took = []
def _timed(panel):
    real = panel.refresh
    def refresh(what=""):
        began = time.perf_counter(); real(what); _took.append(1000 * (time.perf_counter() - began))
    panel.refresh = refresh
for _panel in wb.panels.values(): _timed(_panel)
"""


def timed(page, change, times=ROUNDS):
    "Median milliseconds from a change at the page until the new picture, and of the kernel's refreshes."
    ask(page, "_took.clear()")
    waits = []
    for i in range(times):
        promise = page.evaluate_handle("() => ({ promise: window.next_picture() })")
        change(i)
        waits.append(page.evaluate("held => held.promise", promise))
    kernel = ask(page, "_took")
    return statistics.median(waits), statistics.median(kernel)


def slide(page, key="ArrowLeft"):
    slider = page.get_by_role("slider").locator("visible=true").last
    slider.focus()
    return lambda i: slider.press(key)


def choose(page, label, values):
    field = page.get_by_label(label).locator("visible=true").first
    options = field.locator("option").all_inner_texts()
    return lambda i: field.select_option(label=options[values[i % len(values)]])


@pytest.mark.parametrize("what", ["embedded", "1,000 tensors"])
def test_latency(open_nb, what, record_property):
    page = open_nb("app.ipynb", viewport=(1400, 1900))
    if what == "embedded":
        assert page.evaluate(
            KERNEL, "for step in ('initialize', 'start', 'feed_all', 'end'): getattr(wb, step)()"
        )["error"] is None
    else: open_thousand(page)
    assert page.evaluate(KERNEL, TIMED)["error"] is None
    page.evaluate(WATCH)
    rows = {}
    page.wait_for_timeout(1500)
    rows["ranges: layer"] = timed(page, choose(page, "Layer", [1, 2, 3, 0]))
    rows["ranges: tensor"] = timed(page, choose(page, "Tensor", [1, 0]))
    rows["ranges: select"] = timed(page, choose(page, "Selected", [2, 3, 4, 5]))
    tab(page, "Histogram")
    page.wait_for_timeout(2500)
    rows["histogram: clip"] = timed(page, slide(page))
    rows["histogram: module"] = timed(page, choose(page, "Module", [4, 5, 7, 1]))
    lines = [f"{what:24}{'click to picture':>18}{'kernel':>10}   (median ms)"]
    lines += [f"{name:24}{click:18.0f}{kernel:10.0f}" for name, (click, kernel) in rows.items()]
    record_property("tell", "\n".join(lines))
    assert len(rows) == 5 and not page.console_errors


def open_thousand(page):
    "Put the made-up record in the place of the workbench, as the output of a cell of its own."
    page.evaluate("""async code => { const panel = window.jupyterapp.shell.currentWidget;
        await window.jupyterapp.commands.execute('notebook:insert-cell-below');
        panel.content.activeCell.model.sharedModel.setSource(code);
        await window.jupyterapp.commands.execute('notebook:run-cell'); }""", THOUSAND)
    until(page, "len(wb.record)", 1000)
