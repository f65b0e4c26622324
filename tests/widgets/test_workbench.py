"""The workbench without a browser: every state it can be in, driven from Python and by its own buttons."""
import gc

import pytest
import torch
from helpers import FOUR_BITS, differences, fingerprint, make_batches, make_model

from qcal_nb import Workbench
from qcal_nb.lifecycle import phase_of
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.plots import data_of
from qcal_nb.records import CalibrationRecord
from qcal_nb.session import Session, SessionError
from qcal_nb.session import WorkbenchState
from qcal_nb.widgets import LifecycleStepper, RangeExplorer


def press(wb, *steps):
    "Click buttons; wait for what runs in the background."
    for step in steps:
        wb.stepper.buttons[step.replace("-", "_")].click()
        if wb.session._thread is not None: wb.session._thread.join(120)


def drawn(wb): return data_of(wb.explorer.picture.png)


@pytest.fixture
def wb():
    bench = Workbench(make_model("llama_gqa"), make_batches(4))
    yield bench
    bench.close()


def test_from_initialize_to_reset_by_its_buttons(wb):
    before = fingerprint(wb.session.model)
    press(wb, "initialize", "start", "feed", "feed_all")
    assert (wb.session.phase, wb.session.fed) == ("fed", 4)
    rows = [key for key in wb.record.readers if key[1] == "input"]      # one for q, k and v, and one for gate and up
    inputs = [[wb.record[key].min, wb.record[key].max] for key in rows]
    assert drawn(wb)["range"] == inputs
    press(wb, "end")
    clips = wb.scales().query("base_name == 'input'").set_index("module").clip_max[[name for name, _ in rows]].tolist()
    assert drawn(wb)["clip_max"] == clips and wb.stepper.code.value.count("<code>") == 5
    press(wb, "reset")
    # the record is kept
    assert differences(before, fingerprint(wb.session.model)) == [] and drawn(wb)["range"] == inputs


def test_python_and_mouse_do_the_same(wb):
    other = Workbench(make_model("llama_gqa"), make_batches(4))
    press(wb, "initialize", "start", "feed_all", "end", "back", "end")
    for step in ("initialize", "start", "feed_all", "end", "back", "end"): getattr(other, step)()
    assert wb.scales().equals(other.scales()) and wb.session.code == other.session.code
    assert wb.stepper.changes.value == other.stepper.changes.value and drawn(wb) == drawn(other)
    other.close()


def test_only_legal_buttons_are_enabled_and_the_next_is_marked(wb):
    expected = [("initialize", "start"), ("start", "feed_all"), ("feed_all", "end"), ("end", None)]
    for step, following in expected:
        press(wb, step)
        marked = [name for name, b in wb.stepper.buttons.items() if b.button_style == "primary"]
        assert marked == ([following] if following else [])
        for name, reason in wb.session.legal().items():
            assert wb.stepper.buttons[name].disabled == (reason is not None)
            assert reason is None or reason in wb.stepper.buttons[name].tooltip


def test_scheme_targets_and_ignore_can_be_edited_before_and_not_after(wb):
    wb.stepper.scheme.value = "INT8_STATIC"
    wb.stepper.ignore.value = "lm_head, re:.*down_proj"
    assert wb.scheme == "INT8_STATIC" and "12 of 16 modules" in wb.stepper.matches.value
    assert "int8" in wb.stepper.words.value
    wb.stepper.targets.value = "Linear, Embedding"
    press(wb, "initialize")
    assert "embed_tokens: the input of an Embedding is token ids" in wb.stepper.error.value
    assert wb.session.phase == "original"
    wb.stepper.targets.value = "Linear"
    press(wb, "initialize")
    assert wb.stepper.error.value == "" and wb.stepper.scheme.disabled and wb.stepper.targets.disabled
    with pytest.raises(SessionError, match="the scheme is in use"): wb.scheme = "FP8"


def test_no_data():
    wb = Workbench(make_model("llama_gqa"))
    press(wb, "initialize", "start")
    assert "there is no data; pass data= to feed some" in wb.stepper.buttons["feed"].tooltip and drawn(wb) == {}
    assert wb.explorer.picture.alt == "Nothing recorded yet"
    wb.close()


def test_data_that_cannot_be_read_is_said_at_once():
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="data holds strings but tokenizer=None; pass the model's tokenizer"):
        Workbench(model, ["a text"])
    with pytest.raises(ValueError, match="batch_size=0 must be an int of at least 1"):
        Workbench(model, make_batches(1), batch_size=0)
    assert differences(before, fingerprint(model)) == []
    wb = Workbench(model)
    assert "There is no data to feed, and this scheme needs some" in wb.stepper.note.value
    wb.scheme = "W4A16"
    assert "No data was fed yet" in wb.stepper.note.value
    wb.close()


def test_a_head_that_shares_its_weight_is_fed_too():
    """Its forward is a plain function once compressed-tensors has wrapped it, which no check of schemes would accept
    again."""
    from transformers import BertConfig, BertForMaskedLM
    sizes = dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = BertForMaskedLM(BertConfig(**sizes)).eval()
    before, wb = fingerprint(model), Workbench(model, make_batches(2), ignore=[])
    press(wb, "initialize", "start", "feed_all", "end")
    assert wb.session.phase == "ended" and wb.stepper.error.value == ""
    assert "cls.predictions.decoder" in set(wb.scales().module)
    press(wb, "reset")
    assert differences(before, fingerprint(model)) == []
    wb.close()


def test_a_model_that_the_scheme_does_not_reach():
    with pytest.warns(UserWarning, match="8 Conv1D hold weights"):
        wb = Workbench(make_model("gpt2"), make_batches(2))
        assert "0 of" in wb.stepper.matches.value and "Conv1D" in wb.stepper.matches.value
        press(wb, "initialize", "start", "feed_all", "end")
    assert wb.session.phase == "ended" and drawn(wb) == {}
    press(wb, "reset")
    wb.close()


def test_one_tensor_and_a_tensor_of_zeros():
    wb = Workbench(torch.nn.Sequential(torch.nn.Linear(4, 4)), [torch.zeros(2, 4)], ignore=[])
    press(wb, "initialize", "start", "feed_all", "end")
    assert drawn(wb)["range"] == [[0.0, 0.0]] and wb.session.phase == "ended"
    wb.selected = "0"
    assert "<b>0</b> input: 0 … 0" in wb.explorer.numbers.value
    wb.close()


def test_nan_in_the_data_is_shown_and_the_session_goes_on():
    good, bad = torch.randn(2, 4), torch.full((2, 4), float("nan"))
    wb = Workbench(torch.nn.Sequential(torch.nn.Linear(4, 4)), [good, bad], ignore=[])
    press(wb, "initialize", "start", "feed_all")
    assert "8 non-finite values, the first (nan) at position (0, 0) of batch 1" in wb.stepper.error.value
    assert wb.session.fed == 1 and wb.session.phase == "fed"
    press(wb, "end")
    assert wb.session.phase == "ended" and wb.stepper.error.value == ""
    wb.close()


def test_a_scheme_that_observes_no_activation_says_so():
    wb = Workbench(make_model("llama_gqa"), make_batches(2), scheme="W8A8")
    press(wb, "initialize", "start")
    assert "This scheme observes no activation" in wb.stepper.note.value
    assert wb.stepper.buttons["end"].button_style == "primary"
    press(wb, "end")
    assert wb.session.phase == "ended"
    wb.close()


def test_a_thousand_tensors():
    from qcal_nb.stats import measure
    session = Session(torch.nn.Sequential(torch.nn.Linear(2, 2)), ignore=[])
    names = [f"model.layers.{i // 7}.m{i % 7}" for i in range(1000)]
    tensors = {(n, "input"): measure(torch.tensor([[-1.0 - i, 1.0 + i]])) for i, n in enumerate(names)}
    session.record = CalibrationRecord(tensors, dict.fromkeys(names, "Linear"))
    explorer = RangeExplorer(session)
    assert len(data_of(explorer.picture.png)["range"]) == 1000 and "and 600 more rows" in explorer.table.value
    explorer.state.layer = 5
    assert len(explorer.shown) == 7
    explorer.close()


def test_panels_share_a_state_and_are_widgets_of_their_own(wb):
    press(wb, "initialize", "start", "feed_all")
    state = WorkbenchState(pattern="down_proj")
    explorer, stepper = RangeExplorer(wb.session, state), LifecycleStepper(wb.session, state)
    assert len(explorer.shown) == 2 and len(wb.explorer.shown) == 8
    explorer.order.value = "absmax"
    assert state.order == "absmax" and explorer.table.value.index("layers.") > 0
    for panel in (explorer, stepper):
        assert panel._repr_mimebundle_()["image/png"]
        panel.close()


def test_close_takes_hooks_off_and_a_forgotten_workbench_does_nothing():
    model = make_model("llama_gqa")
    before = fingerprint(model)
    wb = Workbench(model, make_batches(2))
    wb.initialize()
    wb.start()
    wb.close()
    assert differences(before, fingerprint(model)) == []
    first = Workbench(model, make_batches(2))
    first.initialize()
    del first
    gc.collect()
    assert phase_of(model) == "initialized"


def test_the_display_bundle_carries_the_picture(wb):
    wb.initialize()
    wb.start()
    wb.feed_all()
    import base64
    bundle = wb._repr_mimebundle_()
    assert data_of(base64.b64decode(bundle["image/png"])) == drawn(wb)
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_the_quickstart_names(wb):
    model, tokenizer = load_tiny_llama()
    bench = Workbench(model, calibration_texts()[:2], tokenizer, scheme="FP8")
    bench.initialize()
    bench.start()
    bench.feed_all()
    bench.end()
    bench.selected = "model.layers.2.mlp.down_proj"
    assert bench.record.batches == 2 and len(bench.scales()) == 56
    assert "model.layers.2.mlp.down_proj" in bench.explorer.numbers.value
    bench.back()
    bench.reset()
    bench.close()


# --- what a new user broke ---

def test_two_workbenches_on_one_model_notice_each_other():
    model = make_model("llama_gqa")
    first, second = Workbench(model, make_batches(4)), Workbench(model, make_batches(4))
    press(first, "initialize")
    press(second, "initialize")
    assert "something else changed the model since (it is initialized now)" in second.stepper.error.value
    press(first, "start")
    from qcal_nb.lifecycle import reset_quantization
    reset_quantization(model)
    press(first, "feed")
    assert "something else changed the model since (it is original now)" in first.stepper.error.value
    assert first.session.fed == 0
    for bench in (first, second): bench.close()


def test_after_one_batch_the_rest_comes_next(wb):
    press(wb, "initialize", "start", "feed")
    assert wb.stepper.buttons["feed_all"].button_style == "primary" and not wb.stepper.buttons["end"].disabled
    assert "1 of 4 batches fed" in wb.stepper.note.value and wb.stepper.bar.value == 0.25


def test_warnings_are_shown_and_nothing_quantized_is_said():
    with pytest.warns(UserWarning, match="this recipe quantizes nothing"):
        wb = Workbench(make_model("gpt2"), make_batches(2))
        press(wb, "initialize")
    assert "8 Conv1D hold weights" in wb.stepper.error.value
    assert "this recipe quantizes nothing" in wb.stepper.error.value
    press(wb, "start", "end")
    assert "Nothing is quantized" in wb.stepper.phase.value
    wb.close()


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_a_pattern_that_is_none_is_refused_at_once(wb, field):
    getattr(wb.stepper, field).value = "re:("
    assert "&#x27;re:(&#x27; is not a regular expression" in wb.stepper.error.value
    assert "re:(" not in getattr(wb.session, field)


def test_data_that_cannot_be_read_is_said_in_the_panel():
    wb = Workbench(make_model("llama_gqa"), (text for text in ["a text, and no tokenizer"]))
    press(wb, "initialize", "start")
    assert "pass the model's tokenizer" in wb.stepper.buttons["feed"].tooltip
    assert "Cannot feed: the data cannot be read: data holds strings but tokenizer=None" in wb.stepper.note.value
    wb.close()


def test_the_selection_survives_a_filter_and_a_step_back(wb):
    press(wb, "initialize", "start", "feed", "feed_all")
    wb.selected = "model.layers.1.mlp.up_proj"
    wb.explorer.pattern.value = "up_proj"
    assert wb.selected == "model.layers.1.mlp.up_proj"
    # both read one tensor: one row, named by the first
    assert wb.explorer.select.value == "model.layers.1.mlp.gate_proj"
    wb.explorer.pattern.value = "down_proj"
    assert wb.selected == "model.layers.1.mlp.up_proj" and wb.explorer.select.value == ""
    press(wb, "back", "back")
    assert wb.selected == "model.layers.1.mlp.up_proj"


def test_many_scales_are_not_told_as_one():
    model, tokenizer = load_tiny_llama()
    wb = Workbench(model, calibration_texts()[:1], tokenizer, scheme="W4A16")
    press(wb, "initialize", "start", "feed_all", "end")
    wb.state.base_name, wb.selected = "weight", "model.layers.0.mlp.down_proj"
    assert "1,024 scales," in wb.explorer.numbers.value
    assert "in the middle; the widest covers" in wb.explorer.numbers.value
    wb.close()


# --- five panels ---

def test_panels_behind_tabs_rest_until_they_are_seen(wb):
    press(wb, "initialize", "start", "feed_all")
    before = wb.inspector.rows, wb.code.script.text
    wb.state.clip = 0.5
    assert wb.inspector.rows is before[0] and wb.comparison.tables._thread is None
    wb.turn_to("Histogram")
    assert wb.inspector.rows is not before[0] and not wb.explorer.seen and wb.inspector.seen
    press(wb, "end")
    assert wb.code.script.text == before[1]
    wb.turn_to("Code")
    assert wb.code.script.text == wb.script() and "session.end()" in wb.code.script.text
    with pytest.raises(ValueError, match="panel='Histo' must be one of 'Ranges', 'Histogram', 'Compare', 'Code'"):
        wb.turn_to("Histo")


def test_what_is_saved_with_a_notebook_is_the_panel_that_was_turned_to(wb):
    press(wb, "initialize", "start", "feed_all", "end")
    wb.turn_to("Compare")
    shown = wb.static_png()  # at once, as a cell does that ends with the workbench
    assert len(wb.comparison.rows) == 8 and shown == wb.comparison.picture.png != wb.explorer.static_png()


def test_best_observers_by_buttons_need_no_second_feed(wb):
    wb.scheme = FOUR_BITS
    press(wb, "initialize", "start", "feed_all", "end")
    wb.turn_to("Compare")
    wb.comparison.wait()
    wb.comparison.check.value = False
    wb.comparison.use.click()
    assert wb.session.phase == "original" and "Start uses them" in wb.stepper.note.value
    press(wb, "initialize", "start")
    assert "Taken from the record: 4 batches" in wb.stepper.note.value
    assert "Nothing has to be fed again" in wb.stepper.note.value
    assert wb.stepper.buttons["end"].button_style == "primary"
    press(wb, "end")
    best = dict(zip(wb.comparison.rows.module, wb.comparison.rows.best))
    for name, module in wb.session.model.named_modules():
        if name in best: assert torch.equal(module.input_scale, wb.record.results[name, "input", best[name]].scale)


def test_a_saved_run_shows_all_but_the_steps(wb, tmp_path):
    wb.scheme = FOUR_BITS
    press(wb, "initialize", "start", "feed_all", "end")
    saved = Workbench.from_record(wb.record.save(tmp_path / "run"))
    assert saved.stepper is None and drawn(saved)["range"] == drawn(wb)["range"]
    assert drawn(saved)["clip_max"] == drawn(wb)["clip_max"]
    for name in saved.panels:
        saved.turn_to(name)
        assert saved.static_png().startswith(b"\x89PNG")
    saved.comparison.wait()
    assert len(saved.comparison.rows) == 8 and "pass the model" in saved.session.legal()["end"]
    assert saved.comparison.schemes.go.disabled
    assert "Saved(record)" in saved.code.script.text
    chosen = saved.use_best("input")
    assert chosen == wb.use_best("input", check=False) and len(chosen) > 7 and "config_groups" in saved.code.recipe.text
    saved.close()


def test_a_record_and_a_recipe_bring_the_session_back(wb, tmp_path):
    wb.scheme = FOUR_BITS
    press(wb, "initialize", "start", "feed_all", "end")
    assert wb.use_best(check=False)
    press(wb, "initialize", "start", "end")
    wb.code.save("recipe", str(tmp_path / "recipe.yaml"))
    wb.code.save("record", str(tmp_path / "run.record"))
    again = Workbench(make_model("llama_gqa"), record=tmp_path / "run.record", recipe=tmp_path / "recipe.yaml")
    press(again, "initialize", "start")
    assert "Taken from the record" in again.stepper.note.value
    press(again, "end")
    assert again.scales().equals(wb.scales()) and "record=" in again.script()
    again.session.reset()
    again.close()


def test_after_closing_nobody_listens_and_no_thread_runs(wb):
    press(wb, "initialize", "start", "feed_all")
    wb.turn_to("Compare")
    wb.close()
    wb.comparison.wait()
    assert wb.session._listeners == [] and wb.comparison.tables._thread is None
    assert phase_of(wb.session.model) == "original"
    assert not any(m._forward_pre_hooks for m in wb.session.model.modules())
    wb.state.clip = 0.3
    wb.state.selected = "anything"
