"""The panel for one tensor in JupyterLab in Chromium: keys on its controls move read-out and picture, and both are what
the kernel holds."""
import json
import time

import pytest

from tests.widgets.page import KERNEL, ask, drawn

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CELL = """
from qcal_nb.widgets import HistogramInspector
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.session import Session
model, tokenizer = load_tiny_llama()
session = Session(model, calibration_texts()[:4], tokenizer)
session.initialize(); session.start(); session.feed_all()
panel = HistogramInspector(session)
panel
"""
READOUT = """table => Object.fromEntries(Array.from(table.rows).slice(1).map(
  row => [row.cells[0].innerText, Array.from(row.cells).slice(1).map(cell => cell.innerText)]))"""


def data_of(page, name): return drawn(page.locator(f".qcal-inspector-{name} img"))


def eventually(found, wanted, seconds=120):
    "Wait until what is found is what is wanted."
    deadline = time.monotonic() + seconds
    while (last := found()) != wanted():
        assert time.monotonic() < deadline, (last, wanted())
        time.sleep(0.1)


def by_hand(page):
    "Scale and SQNR of the scale by hand, as the page writes them."
    cells = next(
        v for k, v in page.locator(".qcal-inspector-readout-box table").evaluate(READOUT).items() if "by hand" in k
    )
    return [cells[0], cells[4].split(" dB")[0]]


LOOK = """
from qcal_nb.analysis import result_by_hand
from qcal_nb.records import recorded_args
from qcal_nb.plots.tensor import stored_values
def _ends():
    "The smallest and the largest number that the scale by hand can store, from the record and the state alone."
    key = panel.shown()[0]
    args = panel.state.args() or recorded_args(session.record, key)
    found = result_by_hand(session.record[key], key[1], args, panel.state.clip)
    return [stored_values(found)[[0, -1]].tolist()]
def _written():
    row = panel.table.set_index("observer").loc["by hand"]
    return [f"{row.scale:.4g}", f"{row.sqnr_db:.1f}"]
def _channels(): return session.record[panel.shown()[0]].channels.tolist()
"""


@pytest.fixture
def page(lab, open_nb):
    cells = [dict(cell_type="code", id="a0", metadata={}, source=CELL, outputs=[], execution_count=None)]
    meta = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    (lab.root/"inspector.ipynb").write_text(
        json.dumps(dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)), encoding="utf-8"
    )
    page = open_nb("inspector.ipynb", viewport=(1200, 1500))
    page.locator(".qcal-inspector-histogram img").wait_for()
    assert page.evaluate(KERNEL, LOOK)["error"] is None
    return page


def press(page, control, key, times=1):
    handle = page.locator(
        f".qcal-inspector-{control} .noUi-handle, .qcal-inspector-{control} select, .qcal-inspector-{control} input"
    ).first
    handle.focus()
    for _ in range(times): page.keyboard.press(key)


def test_sliders_move_readout_and_picture(page):
    def as_held():
        eventually(lambda: by_hand(page), lambda: ask(page, "_written()"))
        eventually(lambda: data_of(page, "histogram")["by hand"], lambda: ask(page, "_ends()"))
        return data_of(page, "histogram")

    first = as_held()
    press(page, "clip", "ArrowLeft", 20)
    eventually(lambda: ask(page, "round(panel.state.clip, 6)"), lambda: 0.9)
    second = as_held()
    assert second["by hand"] != first["by hand"] and second["count"] == first["count"]
    assert second["static_minmax"] == first["static_minmax"]

    press(page, "format", "ArrowRight", 3)
    eventually(lambda: ask(page, "panel.state.format"), lambda: "int4")
    third = as_held()
    assert third["static_minmax"] != first["static_minmax"]
    everyone = ["by hand", "entropy", "histogram_mse", "percentile", "static_minmax"]
    eventually(lambda: sorted(set(data_of(page, "histogram")) - {"count"}), lambda: everyone)
    page.locator(".qcal-inspector-readout-box").get_by_text("highest SQNR").first.wait_for()
    assert page.locator(".qcal-inspector-readout-box").get_by_text("being searched").count() == 0

    page.locator(".qcal-inspector-log-counts input").uncheck()
    eventually(lambda: ask(page, "panel.state.log_counts"), lambda: False)
    as_held()
    assert page.locator(".qcal-inspector-histogram img").get_attribute("alt").startswith("Histogram of model.layers")

    page.get_by_role("tab", name="Channels").click()
    eventually(lambda: [v for _, v in data_of(page, "channels").get("absmax", [])], lambda: ask(page, "_channels()"))
    page.locator(".qcal-inspector-base-name select").select_option("weight")
    eventually(lambda: [v for _, v in data_of(page, "channels").get("absmax", [])], lambda: ask(page, "_channels()"))
    assert ask(page, "panel.problem.value") == "" and not page.console_errors
