"""The panel that compares observers, without a browser: every state that it can be in."""
import base64
import threading
import time
from dataclasses import replace

import pytest
import torch
from helpers import make_batches, make_model

from qcal_nb.widgets import comparison as drawing
from qcal_nb.evaluate import best, scheme_args_by_module
from qcal_nb.widgets import work
from qcal_nb.analysis import compare_observers, readers_in_words
from qcal_nb.calibration import scheme_args
from qcal_nb.widgets import ObserverComparison
from qcal_nb.widgets.comparison import question_of
from qcal_nb.widgets.work import Question, ComparisonTables
from qcal_nb.evaluate import compare_in_pieces
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.plots import data_of
from qcal_nb.records import CalibrationRecord, observers_from_stats, record
from qcal_nb.stats import measure
from qcal_nb.session import Saved, Session
from qcal_nb.session import WorkbenchState, args_for
from tests.widgets.comparing import feed, ready

GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))


def click(panel, column):
    left, _, width, _ = panel._ax.get_position().bounds
    panel.picture.clicked = [left + width * (column + 0.8) / (len(panel.rows) + 0.6), 0.5, time.time()]


def drawn(panel): return data_of(panel.picture.png)


def plain(column): return column.astype(object).where(column.notna(), None).tolist()


@pytest.mark.parametrize("base_name", ["input", "weight"])
def test_pieces_are_the_whole(monkeypatch, base_name):
    monkeypatch.setattr(best, "TENSORS_AT_ONCE", 3)
    run = record(make_model("llama_gqa"), make_batches(2), observers=["mse"], progress=False)
    for args in (None, args_for("int4")):
        whole = compare_observers(run, [*observers_from_stats(), "mse"], args)
        whole = whole[whole.base_name == base_name].reset_index(drop=True)
        part = compare_in_pieces(run, base_name, args)
        assert len(part) == (8 if base_name == "input" else 14) * 5  # q, k and v read one tensor, gate and up another
        for column in whole: assert plain(part[column]) == plain(whole[column])
        assert [a for a in whole.attrs["args"].split("; ") if a.startswith(base_name)] == part.attrs["args"].split("; ")


def test_a_question_that_nobody_asks_any_more_is_given_up(monkeypatch, session):
    feed(session)
    started, go, made = threading.Event(), threading.Event(), []
    def slow(run, base_name, args, observers, tick, weight_of):
        made.append(base_name)
        tick(0, 14)
        if base_name == "input": started.set(); go.wait(120)
        tick(7, 14)
        made.append(f"{base_name} done")
        return compare_observers(run, observers or None, args)
    monkeypatch.setattr(work, "compare_in_pieces", slow)
    tables = ComparisonTables(lambda ready: None)
    assert tables.of(session.record, Question("input")) is None
    tables.want(Question("input"))
    started.wait(120)
    tables.want(Question("weight"))
    go.set()
    tables.wait(120)
    assert made == ["input", "weight", "weight done"] and tables.of(session.record, Question("input")) is None
    assert tables.of(session.record, Question("weight")) is not None
    assert tables.of(CalibrationRecord(), Question("weight")) is None and tables._thread is None  # another record


def test_the_schemes_observer_is_that_of_the_model(session):
    config = dict(
        group_0=dict(
            targets=["Linear"], weights=dict(num_bits=8), input_activations=dict(num_bits=8, observer="minmax")
        ),
        group_1=dict(
            targets=[UP], weights=dict(num_bits=8, observer="mse"), input_activations=dict(num_bits=8, observer="mse")
        ),
        group_2=dict(targets=["re:.*layers.0.*down_proj"], input_activations=dict(num_bits=8, observer="percentile")),
    )
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(config_groups=config, ignore=["lm_head", "re:.*o_proj"])
    run = record(model, make_batches(1), progress=False)
    modifier.initialize_quantization(model)
    for base_name in ("input", "weight"):
        found = scheme_args_by_module(run, modifier.resolved_config, base_name)
        real = {
            name: scheme_args(m, base_name)
            for name, m in model.named_modules() if name in run.types and scheme_args(m, base_name) is not None
        }
        assert {n: a.observer for n, a in found.items()} == {n: a.observer for n, a in real.items()}
        assert len(found) in (11, 12)


def test_nothing_recorded(session):
    panel = ready(session)
    assert panel.picture.alt == "Nothing recorded yet: feed a batch to compare observers" and drawn(panel) == {}
    assert panel.tables._thread is None
    assert panel.use.disabled and "nothing was recorded yet" in panel.use.tooltip
    assert panel.observers.value == panel.table.value == ""
    assert base64.b64decode(panel._repr_mimebundle_()["image/png"]).startswith(b"\x89PNG")
    panel.close()


def test_what_is_shown_is_what_analysis_says(session):
    panel = ready(feed(session))
    truth = compare_observers(session.record, args=question_of(session, panel.state).args)
    truth = truth[truth.base_name == "input"]
    sqnr = truth.pivot(index="module", columns="observer", values="sqnr_db").loc[list(dict.fromkeys(truth.module))]
    seen = torch.tensor(
        [[x if x is not None else float("nan") for x in column[:4]] for column in drawn(panel)["sqnr_db"]]
    )
    assert torch.allclose(seen, torch.tensor(sqnr[observers_from_stats()].to_numpy(float)).float(), atol=1e-3)
    assert panel.rows.best_db.tolist() == truth[truth.highest_sqnr].sqnr_db.tolist()
    assert panel.rows.best.tolist() == truth[truth.highest_sqnr].observer.tolist()
    assert "8 input tensors of 14 modules as <b>fp8, symmetric, one scale per tensor</b>" in panel.verdict.value
    assert set(panel.rows.scheme) == {"static_minmax"} and (panel.rows.gain_db >= 0).all()
    panel.close()


def test_one_tensor():
    session = feed(Session(torch.nn.Sequential(torch.nn.Linear(8, 4)), [torch.randn(4, 8)], ignore=[]))
    panel = ready(session)
    assert len(panel.rows) == 1 == len(drawn(panel)["sqnr_db"])
    click(panel, 0)
    assert panel.state.selected == "0" and drawn(panel)["selected"] == [0]
    panel.close()


def test_select_by_mouse_list_and_python_and_hover(session):
    panel = ready(feed(session))
    click(panel, 7)
    assert panel.state.selected == DOWN == panel.select.value and drawn(panel)["selected"] == [7]
    assert f"{DOWN} is selected" in panel.picture.alt
    assert panel.observers.value.count("<tr>") - 1 >= 4 and "highest SQNR" in panel.observers.value
    assert "±" in panel.observers.value
    panel.select.value = GATE
    assert panel.state.selected == GATE and drawn(panel)["selected"] == [6]
    panel.state.selected = UP  # which reads the same tensor
    assert panel.select.value == GATE and drawn(panel)["selected"] == [6] and f"{UP} is selected" in panel.picture.alt
    assert "model.layers.1.mlp.gate/up_proj" in panel.observers.value and "gate/up_proj" in panel.table.value
    panel.state.selected = ""
    assert "selected" not in drawn(panel) and "Click a column" in panel.observers.value
    left, _, width, _ = panel._ax.get_position().bounds
    panel.picture.pointer = [left + width * 6.8 / 8.6, 0.5]
    assert panel.picture.hint.startswith(f"model.layers.1.mlp.gate/up_proj\n{panel.rows.best[6]}: ")
    panel.picture.pointer = []
    assert panel.picture.hint == ""
    panel.picture.clicked = [0.001, 0.5, 1]
    assert panel.state.selected == ""
    panel.close()


def test_filter_layer_format_and_order(session):
    panel = ready(feed(session))
    panel.pattern.value = "down_proj"
    assert panel.rows.module.tolist() == ["model.layers.0.mlp.down_proj", DOWN] and len(drawn(panel)["sqnr_db"]) == 2
    panel.layer.value = 1
    assert panel.rows.module.tolist() == [DOWN]
    panel.pattern.value = "nothing"
    assert "No input tensor matches the filter" in panel.verdict.value
    assert panel.picture.alt == "No tensor matches the filter"
    panel.pattern.value, panel.layer.value = "", -1
    eight = panel.rows.best_db.mean()
    panel.format.value = "int3"
    panel.wait()
    assert "int3, symmetric" in panel.verdict.value and panel.rows.best_db.mean() < eight - 10
    panel.symmetric.value = False
    panel.wait()
    assert "int3, asymmetric" in panel.verdict.value
    panel.order.value = "best_db"
    names = dict(zip(panel.rows.module, panel.rows.readers.map(readers_in_words)))
    lowest = names[panel.rows.loc[panel.rows.best_db.idxmin()].module]
    assert panel.table.value.index(lowest) == min(map(panel.table.value.index, names.values()))
    panel.pattern.value = "("
    assert "not a regular expression" in panel.problem.value and len(panel.rows) == 8
    panel.close()


def test_a_question_asked_before_is_not_asked_again(monkeypatch, session):
    panel = ready(feed(session))
    panel.base_name.value = "weight"
    panel.wait()
    monkeypatch.setattr(work, "compare_in_pieces", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(drawing, "plot_observers", lambda *_, **__: pytest.fail("drawn again"))
    for base_name in ("input", "weight", "input"):
        panel.base_name.value = base_name
        assert drawn(panel)["sqnr_db"]
        assert panel.rows.module.tolist() == [m for m, b in session.record.readers if b == base_name]
    assert panel.use_for.value == ("input",)
    panel.close()


def test_while_batches_run_nothing_is_compared(session, monkeypatch):
    asked = []
    monkeypatch.setattr(ComparisonTables, "want", lambda self, question: asked.append(session.running))
    notes = []
    panel = ObserverComparison(session)
    session.listen(lambda what: (panel.refresh(what), notes.append(panel.note.value)) if what == "batch" else None)
    feed(session)
    assert asked and not any(asked) and any("updated when feeding ends" in note for note in notes)
    assert "Batches are running" not in panel.note.value
    panel.close()


def test_the_old_comparison_stays_until_the_new_one_is_there(session):
    session.initialize(); session.start(); session.feed()
    panel = ready(session)
    first = panel.rows
    session.feed_all()
    panel.wait()
    assert len(panel.rows) == 8 and not panel.rows.equals(first)
    session.reset()
    panel.wait()
    assert len(panel.rows) == 8  # a reset keeps the record
    panel.close()


def test_hidden_panels_compare_nothing_until_they_are_shown(session):
    panel = ready(feed(session), visible=False)
    assert panel.tables.kept == {} and "Compared when this is shown" in panel.note.value
    panel.visible = True
    panel.wait()
    assert len(panel.rows) == 8 and panel.note.value == ""
    panel.close()


def test_scales_by_channel_are_measured_where_the_weights_are():
    session = feed(Session(make_model("llama_gqa"), make_batches(2), scheme="INT8_STATIC"))
    panel = ready(session, WorkbenchState(base_name="weight"))
    table = session.comparison(["weight"])
    best = table[table.highest_sqnr].set_index("module")
    for column, wanted in dict(best=best.observer, best_db=best.sqnr_db).items():
        assert panel.rows[column].tolist() == wanted[panel.rows.module].tolist()
    panel.close()


def test_scales_by_channel_are_unknown_without_the_model_and_the_remedy_is_said():
    session = Saved(feed(Session(make_model("llama_gqa"), make_batches(2), scheme="INT8_STATIC")).record)
    panel = ready(session, WorkbenchState(base_name="weight"))
    assert set(panel.rows.best) == {"unknown"} and "Nothing can be compared here" in panel.verdict.value
    assert "evaluate.compare_observers" in panel.verdict.value and panel.use.disabled and panel.table.value == ""
    assert panel.picture.alt.endswith("unknown for all of them") and drawn(panel) == {}
    panel.state.selected = UP
    assert "many" in panel.observers.value or "scales" in panel.observers.value
    panel.format.value = "int8"
    panel.wait()
    assert (panel.rows.best_db > 20).all() and "Nothing can be compared" not in panel.verdict.value
    panel.close()


def test_a_minmax_of_a_weight_is_known_as_static_minmax(session):
    panel = ready(feed(session), WorkbenchState(base_name="weight"))
    table = panel.compared[panel.compared.observer == "static_minmax"]
    assert set(panel.rows.scheme) == {"memoryless_minmax"} and panel.rows.scheme_db.tolist() == table.sqnr_db.tolist()
    truth = record(
        make_model("llama_gqa"), None, scheme="FP8", observers=["memoryless_minmax"], base_names=["weight"],
        progress=False
    )
    assert compare_observers(truth, ["memoryless_minmax"]).sqnr_db.tolist() == table.sqnr_db.tolist()
    panel.close()


def test_dynamic_activations_are_said():
    session = feed(Session(make_model("llama_gqa"), make_batches(2), scheme="W8A8"))
    panel = ready(session)
    assert "computes these scales while the model runs" in panel.verdict.value and "int8" in panel.verdict.value
    panel.close()


def test_nan_zeros_and_an_exact_format():
    names = ["a", "b", "c"]
    values = torch.tensor([1.0, float("nan"), -2.0]), torch.zeros(4), torch.tensor([1.0, -1.0, 0.5, 2.0])
    session = Session(torch.nn.Sequential(torch.nn.Linear(2, 2)), ignore=[])
    session.record = CalibrationRecord(
        {(n, "input"): measure(v[None]) for n, v in zip(names, values)}, dict.fromkeys(names, "Linear")
    )
    panel = ready(session)
    for name in names:
        panel.state.selected = name
        assert "nan" not in panel.observers.value.lower()
    assert "nan" not in panel.table.value and panel.tables.error is None
    panel.close()


def test_a_comparison_that_fails_is_explained_and_the_panel_goes_on(session, monkeypatch):
    feed(session)
    real = work.compare_in_pieces
    def broken(run, base_name, args, observers, tick, weight_of):
        if base_name == "weight": raise ValueError("no such <thing>")
        return real(run, base_name, args, observers, tick, weight_of)
    monkeypatch.setattr(work, "compare_in_pieces", broken)
    panel = ready(session, WorkbenchState(base_name="weight"))
    assert "no such &lt;thing&gt;" in panel.problem.value and panel.picture.alt == "The comparison failed"
    panel.base_name.value = "input"
    panel.wait()
    assert panel.problem.value == "" and len(panel.rows) == 8
    panel.close()


def many(n):
    names = [f"model.layers.{i // 7}.m{i % 7}" for i in range(n)]
    stats = [measure(torch.randn(2, 64, generator=torch.Generator().manual_seed(i)) * (1 + i)) for i in range(7)]
    return CalibrationRecord(
        {(name, "input"): replace(stats[i % 7]) for i, name in enumerate(names)}, dict.fromkeys(names, "Linear")
    )


def test_a_thousand_tensors():
    session = Session(torch.nn.Sequential(torch.nn.Linear(2, 2)), ignore=[])
    session.record = many(1000)
    panel = ready(session)
    assert len(panel.rows) == 1000 and len(drawn(panel)["sqnr_db"]) == 500 and "and 800 more" in panel.table.value
    click(panel, 700)
    assert panel.state.selected == panel.rows.module[700] == panel.select.value and drawn(panel)["selected"] == [700]
    panel.layer.value = 5
    assert len(panel.rows) == 7 and len(drawn(panel)["sqnr_db"]) == 7
    panel.close()


def test_close_ends_listening(session):
    state = WorkbenchState()
    panel = ready(feed(session), state)
    panel.close()
    before = panel.picture.png
    state.selected = UP
    session.back()
    assert session._listeners == [] and panel.picture.png == before
