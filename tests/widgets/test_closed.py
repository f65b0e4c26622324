"""A closed workbench leaves nothing: no widget, no session, no observer."""
import gc
import weakref

import pytest
from helpers import differences, fingerprint, make_batches, make_model
from ipywidgets.widgets.widget import _instances

from qcal_nb import Workbench
from qcal_nb.session import Session
from qcal_nb.widgets import RangeExplorer


@pytest.mark.parametrize("steps", [[], ["initialize", "start", "feed_all"]])
def test_a_closed_workbench_is_forgotten_with_all_that_is_in_it(steps):
    before = set(_instances)
    model = make_model("llama_gqa")
    original = fingerprint(model)
    wb = Workbench(model, make_batches(2), scheme="INT8_STATIC")
    for step in steps: getattr(wb, step)()
    for panel in wb.panels: wb.turn_to(panel)
    wb.comparison.wait()
    assert len(set(_instances) - before) > 100
    session = weakref.ref(wb.session)
    wb.close()
    assert set(_instances) <= before
    del wb
    gc.collect()
    assert session() is None and differences(original, fingerprint(model)) == []


def test_a_panel_that_is_closed_alone_leaves_the_others():
    wb = Workbench(make_model("llama_gqa"), make_batches(1))
    other = RangeExplorer(wb.session, wb.state)
    other.close()
    assert all(panel.comm is not None for panel in (wb, *wb.panels.values()))
    wb.explorer.close()
    assert wb.comm is not None and wb.inspector.comm is not None and wb.tabs.comm is not None
    wb.close()


def test_panels_of_one_session_share_it():
    session = Session(make_model("llama_gqa"), make_batches(1))
    one, two = RangeExplorer(session), RangeExplorer(session)
    one.close()
    session.initialize()
    assert two.comm is not None
    two.close()
