"""LifecycleStepper without a browser: every state it can be in, every field of a scheme, and words with a remedy for
what goes wrong."""
import threading
from html import escape

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from helpers import differences, fingerprint, make_batches, make_model

from qcal_nb.calibration import exclusive
from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.widgets.html import GLOSSARY, glossary_html, status_key, term, tree_html
from qcal_nb.observers import Registry
from qcal_nb.schemes import preset_names
from qcal_nb.session import Session
from qcal_nb.widgets import LifecycleStepper


def press(panel, *steps):
    "Click buttons; wait for what runs in the background."
    for step in steps:
        panel.buttons[step].click()
        if panel.session._thread is not None: panel.session._thread.join(120)


def fields(panel, part="weights"): return panel.parts[part].fields


@pytest.fixture
def panel():
    found = LifecycleStepper(Session(make_model("llama_gqa"), make_batches(4)))
    yield found
    found.close()


# --- the scheme, field by field ---

def test_the_fields_show_every_preset_and_an_edit_of_nothing_is_that_preset(panel):
    for name in preset_names():
        panel.scheme.value = name
        groups = panel.session.modifier.resolved_config.config_groups
        for part in ("weights", "input_activations"):
            args = getattr(groups["group_0"], part)
            shown = fields(panel, part)
            assert shown["on"].value == (args is not None), name
            if args is None:
                assert all(f.disabled for n, f in shown.items() if n != "on")
                continue
            assert [shown[k].value for k in ("num_bits", "type", "symmetric", "strategy", "dynamic")] \
                == [args.num_bits, args.type, args.symmetric, args.strategy, args.dynamic], name
            assert shown["group_size"].value == (args.group_size or 0)
            assert shown["observer"].value == (args.observer or "")
        assert panel.session.scheme == panel.scheme.value == name and panel.error.value == ""


EDITS = [
    ("FP8", "weights", "strategy", "channel", dict(num_bits=8, type="float", strategy="channel")),
    ("FP8", "weights", "type", "int", dict(num_bits=8, type="int", strategy="tensor")),
    ("INT8_STATIC", "weights", "num_bits", 4, dict(num_bits=4, type="int", strategy="channel")),
    ("INT8_STATIC", "weights", "symmetric", False, dict(symmetric=False, strategy="channel")),
    ("INT8_STATIC", "weights", "observer", "mse", dict(observer="mse")),
    ("INT8_STATIC", "weights", "strategy", "group", dict(strategy="group", group_size=128)),
    ("INT8_STATIC", "weights", "strategy", "tensor_group", dict(strategy="tensor_group", group_size=16)),
    ("INT8_STATIC", "weights", "strategy", "block", dict(strategy="block", block_structure=[128, 128])),
    ("W4A16", "weights", "group_size", 32, dict(strategy="group", group_size=32)),
    ("W4A16", "weights", "strategy", "tensor", dict(strategy="tensor", group_size=None)),
    ("W6A16", "weights", "type", "float", dict(num_bits=8, type="float")),
    ("W4A16_ASYM", "weights", "type", "float", dict(num_bits=4, type="float", symmetric=True)),
    ("W8A8", "input_activations", "dynamic", False, None),
    ("W8A8", "input_activations", "strategy", "tensor", dict(strategy="tensor", dynamic=True)),
    ("FP8", "input_activations", "strategy", "token", dict(strategy="token", dynamic=True, observer=None)),
    ("FP8", "input_activations", "strategy", "group", dict(strategy="group", dynamic=True, group_size=128)),
    ("FP8", "input_activations", "dynamic", True, dict(strategy="tensor", dynamic=True, observer=None)),
    ("FP8", "input_activations", "observer", "percentile", dict(observer="percentile", dynamic=False)),
    ("FP8", "weights", "num_bits", 6, None),
    ("FP8", "weights", "symmetric", False, None),
    ("FP8", "weights", "dynamic", "local", None),
    ("INT8_STATIC", "weights", "dynamic", True, None),
    ("NVFP4", "input_activations", "dynamic", False, None),
    ("W4A16", "weights", "group_size", 0, None),
]


@pytest.mark.parametrize("start, part, name, value, expected", EDITS)
def test_one_field_is_edited_or_the_reason_is_said(panel, start, part, name, value, expected):
    panel.scheme.value = start
    model, before = fingerprint(panel.session.model), panel.session.modifier.resolved_config
    old = fields(panel, part)[name].value
    fields(panel, part)[name].value = value
    s = panel.session
    assert differences(model, fingerprint(s.model)) == []
    if expected is None:
        assert s.scheme == panel.scheme.value == start and s.modifier.resolved_config == before
        assert fields(panel, part)[name].value == old
        assert 'role="alert"' in panel.error.value and "Nothing was changed" in panel.error.value
        return
    args = getattr(s.modifier.resolved_config.config_groups["group_0"], part)
    assert {k: getattr(args, k) for k in expected} == expected and panel.error.value == ""
    assert panel.scheme.value == "custom" and ">custom</abbr>" in panel.words.value
    assert fields(panel, part)[name].value == value and isinstance(s.scheme, dict)
    other = next(p for p in panel.parts if p != part)
    assert getattr(before.config_groups["group_0"], other) == getattr(
        s.modifier.resolved_config.config_groups["group_0"], other
    )


def test_an_edited_scheme_is_a_line_of_python_that_does_the_same(panel):
    fields(panel)["strategy"].value = "channel"
    fields(panel, "input_activations")["on"].value = False
    again = Session(make_model("llama_gqa"), make_batches(4))
    for line in panel.session.code: exec(f"again.{line}")
    assert again.modifier.resolved_config == panel.session.modifier.resolved_config
    assert panel.session.modifier.resolved_config.config_groups["group_0"].input_activations is None
    press(panel, "initialize", "start", "end")
    assert panel.session.phase == "ended"
    assert all(m.weight_scale.shape[0] > 1 for m in panel.session.model.modules() if hasattr(m, "weight_scale"))


def test_every_registered_observer_is_offered(panel):
    assert [v for _, v in fields(panel)["observer"].options] == ["", *Registry.registered_names()]


def test_custom_opens_the_fields_and_changes_nothing(panel):
    panel.scheme.value = "custom"
    assert panel.editor.selected_index == 0 and panel.scheme.value == panel.session.scheme == "FP8"
    assert panel.session.code == []


def test_fields_are_shut_once_the_scheme_is_in_use_and_say_why(panel):
    press(panel, "initialize")
    everything = [
        panel.scheme, panel.targets, panel.ignore, *(f for part in panel.parts.values() for f in part.fields.values())
    ]
    assert all(f.disabled and "the scheme is in use (the model is initialized)" in f.tooltip for f in everything)
    assert "the scheme is in use" in panel.why.value
    press(panel, "back")
    assert not panel.scheme.disabled and not fields(panel)["num_bits"].disabled and panel.why.value == ""


def test_schemes_set_from_python_have_a_label(panel):
    s = panel.session
    s.configure(scheme={"FP8": ["re:.*mlp.*"], "W8A8": ["re:.*self_attn.*"]})
    assert panel.scheme.value == "custom" and "re:.*mlp.*" in panel.words.value
    assert "groups of modules have different schemes" in panel.why.value
    assert all(f.disabled for f in fields(panel).values())
    s.configure(
        scheme=QuantizationScheme(targets=["Linear"], weights=dict(num_bits=4, strategy="group", group_size=32))
    )
    assert panel.scheme.value == "custom" and fields(panel)["group_size"].value == 32
    s.options.given["scheme"] = "recipe.yaml"  # a label that stands for a recipe
    panel.refresh()
    assert panel.scheme.value == "recipe.yaml" and ">recipe.yaml</abbr>" in panel.words.value
    s.options.given["scheme"] = QuantizationModifier(scheme="FP8")  # anything else that is no name
    panel.refresh()
    assert panel.scheme.value == "custom"
    panel.scheme.value = "INT8_STATIC"
    assert s.scheme == "INT8_STATIC"


def test_what_initialize_would_refuse_is_said_before(panel):
    panel.scheme.value = "NVFP4"
    assert panel.words.value.count("warning") == 0
    fields(panel)["group_size"].value = 48
    assert "Initialize will refuse this: the scheme does not fit 14 tensors" in panel.words.value
    press(panel, "initialize")
    assert "the scheme does not fit" in panel.error.value and "Choose another scheme" in panel.error.value
    assert panel.session.phase == "original"


@pytest.mark.parametrize("name, text", [("targets", "re:("), ("ignore", "lm_head, re:*")])
def test_a_refused_name_is_said_and_the_field_shows_what_is_set(panel, name, text):
    before = getattr(panel, name).value
    getattr(panel, name).value = text
    assert "is not a regular expression" in panel.error.value
    assert getattr(panel, name).value == before == ", ".join(getattr(panel.session, name))


# --- feeding ---

def test_no_data_says_so_where_one_looks():
    panel = LifecycleStepper(Session(make_model("llama_gqa")))
    press(panel, "initialize", "start")
    assert "Cannot feed: there is no data; pass data= to feed some" in panel.note.value
    assert "Stuck: there is no data" in panel.phase.value
    panel.close()


def test_stopped_half_way(panel):
    s = panel.session
    s.initialize()
    s.start()
    halt = s.listen(lambda what: what == "batch" and s.fed == 3 and s.stop())
    press(panel, "feed_all")
    halt()
    assert s.fed == 3 and "Stopped after 3 of 4 batches" in panel.note.value
    assert "Feed all continues from there" in panel.note.value
    assert panel.bar.value == 0.75 and panel.buttons["feed_all"].button_style == "primary"
    assert not panel.buttons["end"].disabled
    press(panel, "feed_all")
    assert "4 of 4 batches fed" in panel.note.value and "all data was seen" in panel.note.value
    assert "Stopped" not in panel.note.value


def test_paused_and_resumed(panel):
    s, held = panel.session, threading.Event()
    s.initialize()
    s.start()

    def hold(what):
        if what == "batch" and s.fed == 2 and not held.is_set():
            panel.pause_or_resume()
            held.set()

    unlisten = s.listen(hold)
    thread = s.in_background()
    assert held.wait(120)
    assert s.paused and panel.hold.description == "Resume" and not panel.hold.disabled
    assert "Paused after 2 of 4 batches" in panel.note.value and "Paused: feed_all" in panel.phase.value
    assert panel.buttons["end"].disabled and "feed_all is running" in panel.buttons["end"].tooltip
    panel.pause_or_resume()
    thread.join(120)
    unlisten()
    assert s.fed == 4 and panel.hold.description == "Pause" and panel.hold.disabled


def test_an_error_while_feeding_says_what_is_kept_and_what_to_do():
    ids = [torch.tensor([[1, 2, 3]])] * 2 + [torch.tensor([[99999]])]
    panel = LifecycleStepper(Session(make_model("llama_gqa"), ids))
    press(panel, "initialize", "start", "feed_all")
    assert "The failed batch was undone; 2 batches before it are kept. End uses what was fed" in panel.error.value
    assert panel.session.fed == 2 and panel.session.phase == "fed"
    press(panel, "end")
    assert panel.session.phase == "ended" and panel.error.value == ""
    panel.close()


def test_data_that_fails_half_way():
    def data():
        yield torch.tensor([[1, 2, 3]])
        raise OSError("the disk is gone")

    panel = LifecycleStepper(Session(make_model("llama_gqa"), data()))
    press(panel, "initialize", "start", "feed_all")
    assert panel.session.fed == 1 and "the disk is gone" in panel.error.value
    assert "Cannot feed: the data cannot be read" in panel.note.value
    press(panel, "end")
    assert panel.session.phase == "ended"
    panel.close()


def test_somebody_else_at_work_on_the_model(panel):
    press(panel, "initialize", "start")
    with exclusive(panel.session.model, "another session"): press(panel, "feed")
    assert "another session" in panel.error.value and panel.session.fed == 0
    reset_quantization(panel.session.model)
    panel.refresh()
    assert "No step is possible now" in panel.phase.value
    assert "Something else changed the model since" in panel.error.value
    assert all(b.disabled for b in panel.buttons.values())


def test_a_model_without_any_matrix():
    panel = LifecycleStepper(Session(torch.nn.Sequential(torch.nn.ReLU()), [torch.ones(1, 2)]))
    assert "nothing to quantize" in panel.matches.value and "no Linear or Embedding" in panel.tree.value
    panel.close()


def test_while_batches_run_only_the_progress_is_touched(panel, monkeypatch):
    press(panel, "initialize", "start")
    calls = []
    for name in ("legal", "match_report", "statuses"): monkeypatch.setattr(panel.session, name, lambda: calls.append(1))
    panel.refresh("batch")
    assert calls == []


# --- many modules ---

def many(layers):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(
        torch.nn.ModuleDict({n: torch.nn.Linear(2, 2) for n in "abcdefg"}) for _ in range(layers)
    )
    return model


def test_a_thousand_modules_stay_readable():
    panel = LifecycleStepper(Session(many(150), ignore=["layers.77.c"]))
    assert "1,049 of 1,050 modules" in panel.matches.value and "and 650 more rows" in panel.matches.value
    assert panel.matches.value.index(">layers.77.c<") < panel.matches.value.index(">layers.0.a<")
    press(panel, "initialize")
    assert "0–76 <span" in panel.tree.value and "(77 alike)" in panel.tree.value and "78–149" in panel.tree.value
    assert "1,049 initialized" in panel.tree.value and len(panel.tree.value) < 10_000
    assert "and 649 more rows" in panel.changes.value
    panel.close()


def test_layers_that_differ_are_not_merged_and_a_large_tree_is_closed():
    statuses = [
        (f"m.{i}.{name}", ["original", "frozen"][(i + len(name)) % 2]) for i in range(90) for name in ("a", "bb")
    ]
    html = tree_html(statuses)
    assert "alike" not in html and html.count("<details open") == 1 and html.count("<details>") == 90
    assert tree_html([("a.0", "frozen"), ("a.1", "frozen")]).count("alike") == 0  # two are not many


# --- words ---

def test_words_are_explained_for_mouse_and_keyboard(panel):
    assert all(len(sentence) < 200 and "\n" not in sentence for sentence in GLOSSARY.values())
    for word in (
        "observer", "scale", "zero point", "scheme", "strategy", "targets", "ignore", "calibrate", "freeze",
        "fake quantize", "SQNR"
    ):
        assert 'tabindex="0"' in term(word) and escape(GLOSSARY[word.lower()]) in glossary_html()
    controls = [panel.scheme, panel.targets, panel.ignore, panel.order, panel.hold, panel.halt, *panel.buttons.values(),
                *(f for part in panel.parts.values() for f in part.fields.values())]
    assert all(c.description and c.tooltip for c in controls)
    assert all(name in status_key() for name in ("original", "initialized", "calibration", "frozen"))
