"""The panel for one tensor without a browser: controls, read-out and picture say the same, and every odd tensor has its
words."""
import asyncio
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import FOUR_BITS, make_batches, make_model

from qcal_nb.widgets import inspector as module_under_test
from qcal_nb.widgets import panel as panels
from qcal_nb.analysis import (
    BY_HAND,
    compare_observers,
    outlier_ratio,
    per_reader,
    ranges,
    result_by_hand,
)
from qcal_nb.records import CalibrationRecord
from qcal_nb.records import result_from_stats, result_of
from qcal_nb.widgets.inspector import SEARCHING, most_interesting
from qcal_nb.widgets import HistogramInspector
from qcal_nb.plots import LiveHistogram
from qcal_nb.plots.tensor import stored_values
from qcal_nb.plots import data_of, drawn, plot_histogram
from qcal_nb.stats import quality_of
from qcal_nb.records import record
from qcal_nb.session import Session
from qcal_nb.session import WorkbenchState, args_for
from qcal_nb.stats import TensorStats, measure

BATCHES = make_batches(4)


@pytest.fixture(scope="module")
def run(): return record(make_model("llama_gqa"), BATCHES, observers=["static_minmax", "mse"], progress=False)


@pytest.fixture(scope="module")
def key(run): return next(k for k in run.tensors if k[0].endswith("1.mlp.down_proj") and k[1] == "input")


@pytest.fixture
def show():
    "`show(record, **state)`: a panel on a record."
    made = []
    def make(found, **state):
        session = Session(torch.nn.Sequential(torch.nn.Linear(2, 2)), ignore=[])
        session.record = found
        made.append(HistogramInspector(session, WorkbenchState(**state)))
        return made[-1]
    yield make
    for panel in made: panel.close()


def picture(panel, page="Histogram"): return data_of(panel.pictures[page].png)


def odd(**tensors):
    "A record of single tensors by name."
    found = {(name, "input"): measure(x) if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    return CalibrationRecord(found, dict.fromkeys(tensors, "Linear"), spans=((0, 1),))


# --- controls, state, read-out, picture ---

@pytest.mark.parametrize("control, value", [
    ("format", "int4"), ("format", "fp8"), ("clip", 0.5), ("log_counts", False), ("grid", False),
    ("base_name", "weight"), ("selected", "model.layers.0.self_attn.q_proj")
])
def test_each_control_sets_the_state_and_the_state_each_control(run, show, control, value):
    one, other = show(run), show(run)
    before = one.pictures["Histogram"].png
    getattr(one, control).value = value
    setattr(other.state, control, value)
    assert getattr(one.state, control) == value == getattr(other, control).value
    assert one.pictures["Histogram"].png != before and picture(one) == picture(other)
    assert one.readout_box.value == other.readout_box.value
    assert one.problem.value == ""


def test_symmetric_counts_for_int_formats_alone(run, key, show):
    panel = show(run, selected=key[0])
    assert panel.symmetric.disabled
    panel.format.value = "int8"
    assert not panel.symmetric.disabled
    panel.symmetric.value = False
    wanted = result_from_stats(run[key], "input", "static_minmax", args_for("int8", False))
    assert panel.state.symmetric is False and panel.table.zero_point.iloc[0] == wanted.zero_point.item() != 0
    panel.format.value = "fp8"
    assert panel.symmetric.disabled and panel.table.zero_point.iloc[0] == 0


@pytest.mark.parametrize("format", ["", "int8", "int4", "int2", "fp8", "fp4"])
@pytest.mark.parametrize("base_name", ["input", "weight"])
def test_readout_and_picture_are_what_the_analysis_says(run, key, show, base_name, format):
    panel = show(run, selected=key[0], base_name=base_name, format=format, clip=0.3)
    wanted = per_reader(compare_observers(run, args=panel.state.args())).query(
        "module == @key[0] and base_name == @base_name"
    ).set_index("observer")
    table = panel.table.set_index("observer")
    assert list(table.index) == [*wanted.index, BY_HAND]
    for column in ("scale", "zero_point", "clipped", "mse", "sqnr_db", "bound_db", "levels_used"):
        assert np.array_equal(
            table[column].drop(BY_HAND).to_numpy(float), wanted[column].to_numpy(float), equal_nan=True
        ), column
    db, bound = table.sqnr_db.astype(float), table.bound_db.astype(float).fillna(0)
    alike, own = db + bound >= db.max() - bound[db.idxmax()], "static_minmax"  # that of inputs in the session's FP8
    best = own if base_name == "input" and alike[own] else db.idxmax()
    assert table.highest.idxmax() == best and panel.readout_box.value.count(">highest SQNR<") == 1
    assert not table.best.any() and "★ best" not in panel.readout_box.value     # without gradients none is
    stats, hand = run[key[0], base_name], result_by_hand(run[key[0], base_name], base_name, panel.state.args(), 0.3)
    assert table.sqnr_db[BY_HAND] == quality_of(stats, hand.args, hand.scale, hand.zero_point).sqnr_db
    got = picture(panel)
    assert np.isclose(sum(got.pop("count")), stats.count)
    assert got.pop(BY_HAND) == [stored_values(hand)[[0, -1]].tolist()]
    for name, ends in got.items():
        assert ends == [stored_values(result_of(run, (key[0], base_name), name, panel.state.args()))[[0, -1]].tolist()]
    assert set(got) == set(wanted.index[wanted.reason == ""])


def test_moving_the_clip_range_asks_no_observer_again(run, key, show, monkeypatch):
    panel = show(run, selected=key[0], format="int4")
    monkeypatch.setattr("qcal_nb.analysis.observers.result_of", lambda *a: pytest.fail("an observer was asked again"))
    before = picture(panel)
    for clip in (0.9, 0.5, 0.1): panel.clip.value = clip
    after = picture(panel)
    assert after[BY_HAND] != before[BY_HAND] and {**after, BY_HAND: 0} == {**before, BY_HAND: 0}
    assert panel.problem.value == ""


def test_the_live_picture_is_the_same_after_any_path(run, key):
    def results(format, clip): return [result_from_stats(run[key], "input", "static_minmax", args_for(format)),
                                           result_by_hand(run[key], "input", args_for(format), clip)]
    live = LiveHistogram()
    for log, grid in ((True, True), (False, True), (False, False), (True, False)):
        live.draw(run[key], "input", results("int2", 0.2), log, grid)
        live.draw(measure(torch.rand(9, 9)), "input", results("int8", 0.9), log, grid)
        live.draw(run[key], "input", results("int8", 0.1), log, grid)
        live.draw(run[key], "input", results("int8", 0.7), log, grid)
        fresh = LiveHistogram()
        fresh.draw(run[key], "input", results("int8", 0.7), log, grid)
        a, b = (np.asarray(one.ax.figure.canvas.buffer_rgba()).astype(int) for one in (live, fresh))
        assert a.shape == b.shape and (abs(a - b).max(-1) > 8).mean() < 0.002
        assert data_of(live.png()) == data_of(fresh.png())


def test_plot_histogram_shows_more_conclusions(run, key):
    hand = result_by_hand(run[key], "input", args_for("int4"), 0.5)
    ax = plot_histogram(run, *key, ["percentile"], args_for("int4"), more=[hand], log_counts=False, grid=False)
    assert ax.get_yscale() == "linear" and set(drawn(ax)) == {"count", "percentile", BY_HAND}
    assert f"by hand: scale {hand.scale.item():.4g}" in " ".join(t.get_text() for t in ax.texts)


@pytest.mark.parametrize("page, name", [("Scales", "median"), ("Batches", "max"), ("Channels", "absmax")])
def test_a_page_is_drawn_when_it_is_opened_and_not_before(run, key, show, page, name):
    panel = show(run, selected=key[0])
    assert panel.pictures[page].png == b""
    panel.tabs.selected_index = module_under_test.PAGES.index(page)
    assert name in picture(panel, page) and panel.pictures[page].alt and panel.problem.value == ""
    histogram = panel.pictures["Histogram"].png
    panel.state.clip = 0.1
    assert panel.pictures["Histogram"].png == histogram
    panel.tabs.selected_index = 0
    assert panel.pictures["Histogram"].png != histogram


def test_scales_follow_observer_and_format(run, show):
    panel = show(run)
    panel.tabs.selected_index = 1
    for observer, format in (("percentile", ""), ("percentile", "int4"), ("static_minmax", "int4")):
        panel.observer.value, panel.state.format = observer, format
        wanted = per_reader(
            compare_observers(run, [observer], panel.state.args())
        ).query("base_name == 'input'").scale.tolist()
        assert np.allclose([y for _, y in picture(panel, "Scales")["median"]], wanted, rtol=1e-6)


def test_a_click_puts_the_end_of_the_range_there(run, key, show):
    panel = show(run, selected=key[0])
    ax, absmax = panel.live.ax, run[key].absmax
    for share in (0.6, -0.25):
        x, y = ax.transData.transform((share * absmax, 5)) / ax.figure.bbox.size
        panel.pictures["Histogram"].clicked = [x, 1 - y, share]
        assert np.isclose(panel.state.clip, abs(share))


def test_the_heading_says_whose_format_it_is(run, key, show):
    bare = dataclasses.replace(run, results={})
    assert "(as in the scheme)" in show(run, selected=key[0]).heading.value
    assert "the default: no observer was attached" in show(bare, selected=key[0]).heading.value
    assert "int4" in (words := show(run, selected=key[0], format="int4").heading.value) and "scheme" not in words


# --- what is on its way ---

def test_who_waits_at_the_page_gets_what_is_quick_first(run, key, show):
    async def drag():
        panel = show(run, selected=key[0])
        panel._hurried = True
        panel.state.format = "int3"
        panel._hurried = False
        first = panel.table.set_index("observer").reason.to_dict()
        for _ in range(12_000):
            await asyncio.sleep(0.01)
            if SEARCHING not in set(panel.table.reason): break
        return panel, first
    # browser tests leave a loop running here
    with ThreadPoolExecutor(1) as elsewhere: panel, first = elsewhere.submit(asyncio.run, drag()).result()
    assert {name for name, reason in first.items() if reason == SEARCHING} == {"entropy", "histogram_mse"}
    other = show(run, selected=key[0], format="int3")  # from Python: all at once
    assert panel.readout_box.value == other.readout_box.value and picture(panel) == picture(other)
    assert SEARCHING not in panel.readout_box.value


def test_live_drawing_takes_a_small_share_of_the_time(run, show, monkeypatch):
    panel, clock, drawn_at = show(run), [1000.0], []
    monkeypatch.setattr(panels.time, "monotonic", lambda: clock[0])
    def slow(panel, what=""):
        drawn_at.append(clock[0])
        clock[0] += 0.1
    monkeypatch.setattr(module_under_test, "_refresh_inspector", slow)
    for _ in range(5000):
        clock[0] += 0.01  # a batch
        panel._heard("batch")
    assert 5 < len(drawn_at) and len(drawn_at) * 0.1 <= panels.SHARE * (clock[0] - 1000.0) + 0.1
    before = len(drawn_at)
    panel._heard("end")
    assert len(drawn_at) == before + 1  # what is no batch is always shown


def test_it_follows_a_session_that_feeds_in_another_thread():
    session = Session(make_model("llama_gqa"), BATCHES)
    panel = HistogramInspector(session)
    assert "Initialize, start and feed a batch" in panel.message.value
    session.initialize()
    session.start()
    assert "feed a batch" in panel.message.value and "choose weight" in panel.message.value
    thread = threading.Thread(target=session.feed_all)
    thread.start()
    thread.join(180)
    key, _ = panel.shown()
    assert panel.message.value == "" and np.isclose(sum(picture(panel)["count"]), session.record[key].count)
    assert panel.problem.value == ""
    session.back()
    assert "feed a batch" in panel.message.value
    panel.close()
    assert not session._listeners


# --- every odd case has its words ---

def test_nothing_selected_takes_the_largest_outliers_and_says_so(run, show):
    table = ranges(run).query("base_name == 'input'")
    wanted = table.loc[table.outlier_ratio.idxmax()].module
    assert most_interesting(run, "input") == wanted and outlier_ratio(run[wanted, "input"]) == table.outlier_ratio.max()
    panel = show(run)
    assert panel.shown()[0] == (wanted, "input") and panel.state.selected == ""
    assert f"None is selected; of {len(table)}" in panel.heading.value and wanted in panel.heading.value


@pytest.mark.parametrize("tensors, state, words", [
    (dict(), dict(), "Nothing recorded yet"),
    (dict(a=TensorStats()), dict(), "Nothing was seen of any input so far: feed a batch"),
    (dict(a=torch.ones(2, 2), b=TensorStats()), dict(selected="b"), "Nothing was seen of the input of b so far"),
    (dict(a=torch.ones(2, 2)), dict(base_name="output"), "No output was recorded; there is input"),
    (dict(a=torch.ones(2, 2)), dict(selected="c"), "c has no input in this record. Choose another module.")])
def test_nothing_to_see(show, tensors, state, words):
    panel = show(odd(**tensors), **state)
    assert words in panel.message.value and panel.tabs.layout.display == "none" and panel.problem.value == ""
    assert not len(panel.table)
    assert panel.static_png().startswith(b"\x89PNG")
    panel.session.record = odd(a=torch.randn(8, 8), b=torch.randn(8, 8), c=torch.randn(8, 8))
    panel.state.base_name = "input"
    panel.refresh()
    assert panel.message.value == "" and panel.tabs.layout.display != "none" and picture(panel)["count"]


@pytest.mark.parametrize("x, words", [
    (torch.zeros(4, 4), "All of its values are 0"),
    (torch.tensor([[1.0, torch.nan], [torch.inf, -2.0]]), "1 NaN and 1 infinite values were left out"),
    (torch.full((2, 2), torch.nan), "4 NaN and 0 infinite values were left out")], ids=["zeros", "some", "all"])
@pytest.mark.parametrize("format", ["", "int4", "fp8", "fp4"])
def test_odd_tensors(show, x, words, format):
    panel = show(odd(a=x), format=format, clip=0.5)
    assert words in panel.notes.value and panel.problem.value == "" and panel.message.value == ""
    for index in range(4): panel.tabs.selected_index = index
    assert panel.problem.value == "" and panel.static_png().startswith(b"\x89PNG")


GROUPS = {"weights": dict(num_bits=4, strategy="group", group_size=16)}


@pytest.mark.parametrize("scheme", ["FP8_DYNAMIC", "NVFP4", GROUPS], ids=["channel", "nvfp4", "group"])
def test_many_scales_are_shown_as_what_they_are(show, scheme):
    run = record(
        make_model("llama_gqa"), None, scheme=scheme, observers=["memoryless_minmax"], base_names=["weight"],
        progress=False
    )
    panel = show(run, base_name="weight", clip=0.5)
    row = panel.table.set_index("observer").loc["memoryless_minmax"]
    assert row.scales > 1 and "the largest is drawn" in panel.readout_box.value and "many scales" in panel.notes.value
    assert BY_HAND in picture(panel) and np.isfinite(panel.table.set_index("observer").sqnr_db[BY_HAND])
    assert panel.problem.value == ""
    panel.tabs.selected_index = 1
    assert picture(panel, "Scales")["range"] and panel.problem.value == ""


def test_a_fault_is_told_in_the_panel_and_it_goes_on(run, show, monkeypatch):
    panel = show(run)
    monkeypatch.setattr(module_under_test, "readout", lambda *a: 1 / 0)
    panel.state.clip = 0.5
    assert "division by zero" in panel.problem.value
    monkeypatch.undo()
    panel.state.clip = 0.4
    assert panel.problem.value == "" and BY_HAND in picture(panel)


def test_a_share_that_the_slider_does_not_have_is_kept(run, show):
    panel = show(run)
    panel.state.clip = 0.001
    assert panel.state.clip == 0.001 and panel.clip.value == panel.clip.min


def test_names_are_escaped_and_alt_text_is_words(show):
    panel = show(odd(**{"<img src=x>": torch.randn(8, 8)}))
    assert "<img" not in panel.heading.value.replace("&lt;img", "")
    alt = panel.pictures["Histogram"].alt
    assert alt.startswith("Histogram of ") and "highest SQNR: " in alt and "</" not in alt


def test_every_control_has_a_label_and_a_sentence(run, show):
    panel = show(run)
    for name, tip in module_under_test._TIPS.items():
        control = getattr(panel, name)
        assert control.description and control.tooltip == tip and not tip.endswith(".")


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("base_name", ["input", "weight"])
def test_the_scales_page_shows_what_the_recipe_would_give(best, base_name):
    "Not those of an observer that was attached to compare; after `use_best` each tensor's own."
    session = Session(make_model("llama_gqa"), make_batches(3), scheme=FOUR_BITS)
    for step in ("initialize", "start", "feed_all"): getattr(session, step)()
    if best:
        assert session.use_best(check=False)
        for step in ("initialize", "start"): getattr(session, step)()
    session.end()
    panel = HistogramInspector(session, WorkbenchState(base_name=base_name))
    panel.tabs.selected_index = 1
    scales = session.scales().query(f"base_name == '{base_name}'").set_index("module").scale
    shown = [y for _, y in data_of(panel.pictures["Scales"].png)["median"]]
    assert shown == pytest.approx([scales[m] for m, b in session.record.tensors if b == base_name], rel=1e-6)
    panel.close()
