"""RangeExplorer without a browser: what it shows, chooses and says in every state; drawings and tables are made once
for a record."""
import time

import numpy as np
import pytest
import torch
from helpers import make_batches, make_model

from qcal_nb.widgets import explorer as module
from qcal_nb.widgets import panel as panels
from qcal_nb.analysis import choose, compare_observers, ranges, readers_in_words
from qcal_nb.widgets.explorer import Drawing, point_out
from qcal_nb.plots import data_of
from qcal_nb.plots import plot_ranges, to_png
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.session import Session
from qcal_nb.session import WorkbenchState
from qcal_nb.stats import measure
from qcal_nb.widgets import RangeExplorer


def explore(tensors, **state):
    "An explorer of a record that is made up: {(module, base_name): tensor}."
    session = Session(torch.nn.Sequential(torch.nn.Linear(2, 2)), ignore=[])
    if isinstance(tensors, dict):
        stats = {key: measure(value) for key, value in tensors.items()}
        tensors = CalibrationRecord(
            stats, dict.fromkeys((m for m, _ in stats), "Linear"), spans=((0, 1),), level_tokens={0: 8}
        )
    session.record = tensors
    return RangeExplorer(session, WorkbenchState(**state))


def column(panel, index):
    "Where the middle of a column is, as a fraction of the picture's width."
    left, _, width, _ = panel._ax.get_position().bounds
    low, high = panel._ax.get_xlim()
    return left + width * (index - low) / (high - low)


@pytest.fixture(scope="module")
def run():
    return record(make_model("llama_gqa"), make_batches(4), base_names=["input", "weight", "output"], progress=False)


@pytest.fixture
def panel(run):
    found = explore(run)
    yield found
    found.close()


# --- two views ---

@pytest.mark.parametrize("base_name", ["input", "weight", "output"])
def test_ranges_are_those_of_the_record(panel, run, base_name):
    panel.base_name.value = base_name
    held = [[run[key].min, run[key].max] for key in run.readers if key[1] == base_name]
    assert data_of(panel.picture.png)["range"] == held and panel.state.base_name == base_name


def test_density_shows_the_chosen_tensors_alone(panel, run):
    panel.view.value, panel.pattern.value = "density", "down_proj"
    field = np.array(data_of(panel.picture.png)["log10_count"], dtype=float)
    counts = [run[m, base].count for m, base in run.readers if base == "input" and "down_proj" in m]
    assert panel.state.view == "density" and np.allclose(np.nansum(10.0 ** field, axis=1), counts, rtol=0.01)
    assert panel.picture.alt.startswith("Densities of 2 input tensors; the widest is ")


@pytest.mark.parametrize("view", ["ranges", "density"])
def test_hover_names_and_click_selects_in_both_views(panel, view):
    panel.state.view = view
    for index in (0, 3, 7):
        row = panel.shown.iloc[index]
        panel.picture.pointer = [column(panel, index), 0.5]
        words = readers_in_words(row.readers)
        assert (
            panel.picture.hint == f"{words}\n{row['min']:.4g} … {row['max']:.4g}, outlier ratio {row.outlier_ratio:.3g}"
        )
        panel.picture.clicked = [column(panel, index), 0.5, index]
        assert panel.state.selected == panel.select.value == row.module
        assert words in panel.numbers.value and f"{row['min']:.4g} … {row['max']:.4g}" in panel.numbers.value
    panel.picture.pointer = [0.001, 0.5]
    assert panel.picture.hint == ""


def test_the_options_are_what_the_record_holds(panel, run):
    assert [v for _, v in panel.base_name.options] == ["input", "weight", "output"]
    assert [v for _, v in panel.layer.options] == [-1, 0, 1]
    only = explore({("a", "k"): torch.ones(2, 2)}, base_name="k")
    assert [v for _, v in only.base_name.options] == ["k"] and len(only.shown) == 1


# --- choosing ---

@pytest.mark.parametrize("order", ["absmax", "outlier_ratio", "std", "min", "max", "module", "depth"])
def test_orders_sort_table_and_list(panel, run, order):
    panel.order.value = order
    expected = choose(ranges(run), base_name="input", order=order).module.tolist()
    assert [v for _, v in panel.select.options[1:]] == expected
    places = [panel.table.value.index(f">{m}<") for m in expected]
    assert places == sorted(places) and "outlier ratio</abbr>" in panel.table.value
    # the picture stays in model order
    assert panel.shown.module.tolist() == choose(ranges(run), base_name="input").module.tolist()


def test_sqnr_is_found_when_asked_for_and_once(panel, run, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "compare_observers", lambda r, **k: calls.append(r) or compare_observers(r, **k))
    panel.order.value = "absmax"
    assert calls == [] and "sqnr_db" not in panel.shown
    panel.order.value = "sqnr_db"
    panel._known.comparing.join(180)
    best = compare_observers(run).query("base_name == 'input'").groupby("module").sqnr_db.max().sort_values(
        kind="stable"
    )
    shown = choose(panel.shown, order="sqnr_db").set_index("module").sqnr_db
    assert shown.is_monotonic_increasing and np.allclose(shown, best[shown.index])
    panel.layer.value = 1
    panel.order.value, panel.order.value = "absmax", "sqnr_db"
    assert len(calls) == 1 and calls[0] is run and "Computing the SQNR" not in panel.hint.value
    assert ">SQNR<" in panel.table.value


def test_a_refused_filter_is_explained_and_changes_nothing(panel):
    panel.pattern.value = "q_proj"
    panel.pattern.value = "("
    assert "not a regular expression" in panel.problem.value and "mlp, always works" in panel.problem.value
    assert panel.state.pattern == "q_proj" and len(panel.shown) == 2
    panel.pattern.value = "k_proj"
    assert panel.problem.value == "" and panel.state.pattern == "k_proj"


def test_state_set_from_python_moves_the_controls_and_is_not_moved_by_them(panel):
    for name, value in dict(layer=1, base_name="weight", pattern="mlp", order="std", view="density").items():
        setattr(panel.state, name, value)
        assert getattr(panel.state, name) == value == getattr(panel, name).value
    assert len(panel.shown) == 3
    panel.state.layer = 7  # nothing was recorded for it
    assert panel.state.layer == panel.layer.value == 7 and "7 (none recorded)" in dict(panel.layer.options)


def test_a_selection_that_is_not_shown_says_so(panel):
    panel.state.selected = "model.layers.1.mlp.up_proj"
    panel.layer.value = 0
    assert "model.layers.1.mlp.up_proj is selected, but it is not shown here" in panel.numbers.value
    assert panel.select.value == ""
    assert panel.state.selected == "model.layers.1.mlp.up_proj"


# --- states that are hard to look at ---

def test_nothing_recorded():
    panel = explore(CalibrationRecord())
    assert panel.picture.alt == "Nothing recorded yet" and data_of(panel.picture.png) == {} and panel.table.value == ""
    assert "Initialize, Start, then feed a batch" in panel.hint.value and panel.all.layout.display == "none"
    for view in ("density", "ranges"): panel.view.value = view
    panel.order.value = "sqnr_db"
    assert panel._known.comparing is None and panel.static_png().startswith(b"\x89PNG")


def test_nothing_matches_says_how_to_widen_the_choice(panel):
    panel.pattern.value, panel.layer.value = "no_such_module", 1
    assert "None of 8 input tensors matches filter “no_such_module” and layer 1. Show all" in panel.hint.value
    assert panel.picture.alt == "No tensor matches this choice" and panel.all.layout.display == ""
    panel.all.click()
    assert len(panel.shown) == 8 and panel.pattern.value == "" and panel.layer.value == -1 and panel.hint.value == ""


def test_a_base_name_that_was_not_recorded(panel):
    panel.state.base_name = "q"
    assert "No q was seen so far" in panel.hint.value
    assert "Choose input or weight or output under Tensor" in panel.hint.value
    assert panel.base_name.value == "q" and len(panel.shown) == 0


def test_zeros_and_not_a_number_are_said():
    panel = explore({("zeros", "input"): torch.zeros(4, 4), ("broken", "input"): torch.full((4, 4), torch.nan),
                     ("bell", "input"): torch.randn(64, 4), ("spoilt", "input"): torch.tensor([[1.0, torch.inf]])})
    assert len(panel.shown) == 4
    assert "NaN or infinity in 2 tensors (crosses), the first in broken: nan at (0, 0)" in panel.hint.value
    assert "1 tensor holds only zeros, zeros among them" in panel.hint.value
    for name in ("broken", "zeros", "spoilt"):
        panel.select.value = name
        assert f"<b>{name}</b> input" in panel.numbers.value
    assert "0 NaN, 1 infinite" in panel.numbers.value
    panel.view.value = "density"
    assert panel.picture.png.startswith(b"\x89PNG") and panel.picture.alt.startswith("Densities of 4 input tensors")


def test_nothing_but_nan():
    panel = explore({("broken", "input"): torch.full((2, 2), torch.nan)})
    for view in ("density", "ranges"):
        panel.view.value = view
        assert panel.picture.alt.endswith("of 1 input tensor; none holds a finite value")


def test_one_tensor():
    panel = explore({("only", "input"): torch.tensor([[1.0, -2.0]])})
    panel.picture.clicked = [column(panel, 0), 0.5, 1]
    assert panel.state.selected == "only" and "-2 … 1" in panel.numbers.value


# --- a picture is drawn once ---

def test_what_is_pointed_out_changes_pixels_and_not_numbers(run):
    from io import BytesIO

    from PIL import Image
    table = ranges(run).query("base_name == 'input'").reset_index(drop=True)
    drawing = Drawing(ax := plot_ranges(table, "input"), to_png(ax), len(table))
    before = np.asarray(Image.open(BytesIO(drawing.png)).convert("L"), dtype=int)
    for index in (0, 4, 7):
        png = point_out(drawing, index, "name")
        after = np.asarray(Image.open(BytesIO(png)).convert("L"), dtype=int)
        assert data_of(png) == data_of(drawing.png) and after.shape == before.shape
        changed = np.flatnonzero((after < before - 20).any(axis=0)) / before.shape[1]
        left, _, width, _ = ax.get_position().bounds
        at = left + width * (index + 0.8) / (len(table) + 0.6)
        assert changed.min() < at < changed.max() and changed.max() - changed.min() < 0.2


def test_moving_back_draws_nothing_anew(panel, monkeypatch):
    drawn = []
    original = module.plot_ranges
    monkeypatch.setattr(module, "plot_ranges", lambda *a, **k: drawn.append(1) or original(*a, **k))
    for layer in (0, 1, -1, 0, 1, -1): panel.layer.value = layer
    assert len(drawn) == 2  # the first picture was there already
    for name in list(panel.shown.module): panel.select.value = name
    for order in ("absmax", "std", "depth"): panel.order.value = order
    panel.state.format, panel.state.clip = "int4", 0.5
    assert len(drawn) == 2
    panel.session.record = replace_first(panel.session.record)
    panel.refresh("feed")
    assert len(drawn) == 3


def replace_first(run):
    "The same record with another first tensor."
    from dataclasses import replace
    first = next(iter(run.tensors))
    return replace(run, tensors={**run.tensors, first: measure(torch.randn(8, 64))})


def test_the_last_batch_is_always_drawn_and_others_now_and_then(monkeypatch):
    session = Session(make_model("llama_gqa"), make_batches(12))
    session.initialize()
    session.start()
    panel, spent = RangeExplorer(session), []
    original = module._refresh_ranges

    def timed(*args):
        began = time.monotonic()
        original(*args)
        if args[1] == "batch": spent.append((began, time.monotonic()))

    monkeypatch.setattr(module, "_refresh_ranges", timed)
    session._listeners[:] = [panel._heard]
    session.feed_all()
    inputs = [[session.record[key].min, session.record[key].max] for key in session.record.readers if key[1] == "input"]
    assert data_of(panel.picture.png)["range"] == inputs and panel.state.selected == ""
    assert 1 <= len(spent) < 12
    assert all(
        after[0] - before[1] >= (before[1] - before[0]) / panels.SHARE * 0.9 for before, after in zip(spent, spent[1:])
    )
    session._listeners[:] = []
    session.reset()


def test_other_sliders_do_not_redraw(panel, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_refresh_ranges", lambda *a: calls.append(a))
    panel.state.clip, panel.state.format, panel.state.symmetric, panel.state.grid = 0.5, "int4", False, False
    assert calls == []
    panel.state.order = "std"
    assert len(calls) == 1


def test_closed_it_no_longer_follows_the_state(run, monkeypatch):
    panel, calls = explore(run), []
    panel.close()
    monkeypatch.setattr(module, "_refresh_ranges", lambda *a: calls.append(a))
    panel.state.order = "std"
    assert calls == [] and not panel.session._listeners


def test_every_control_has_a_label_and_a_tooltip(panel):
    for name in ("base_name", "layer", "pattern", "order", "select", "all"):
        control = getattr(panel, name)
        assert control.description and control.tooltip, name
    assert [label for label, _ in panel.view.options] == ["Ranges", "Density"] and len(panel.view.tooltips) == 2
