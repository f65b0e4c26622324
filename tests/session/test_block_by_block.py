"""Sessions that feed block by block: the scales of `calibrate`, the record of whole passes, all of it or nothing."""
from unittest.mock import patch

import pytest
import torch
from helpers import make_batches, make_model, qparams

from qcal_nb.calibration import ModelBusyError
from qcal_nb.lifecycle import QuantizationModifier, changes, reset_quantization, snapshot
from qcal_nb.observers import Observer
from qcal_nb.pipelines import calibrate
from qcal_nb.records import CalibrationRecord, record, record_equal
from qcal_nb.session import Session, SessionError
from qcal_nb.widgets import Workbench

GROUPS = {"weights": dict(num_bits=4, strategy="group", group_size=32), "input_activations": dict(num_bits=8)}
SCHEMES = {"FP8": "FP8", "INT8_STATIC": "INT8_STATIC", "groups": GROUPS}
FAMILIES = ["llama_gqa", "mixtral", "gpt_neox", "opt", "gemma2"]


def fed(session, *steps):
    for step in ("initialize", "start", "feed_all", *steps): getattr(session, step)()
    return session


def same(a, b):
    assert a and a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))]


@pytest.mark.parametrize("propagate", ["float", "quantized"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_scales_are_those_of_calibrate(family, scheme, propagate):
    way = dict(pipeline="sequential", propagate=propagate)
    model, other, data = make_model(family), make_model(family), make_batches(3)
    session = fed(Session(model, data, scheme=SCHEMES[scheme], **way), "end")
    calibrate(other, data, QuantizationModifier(scheme=SCHEMES[scheme], ignore=["lm_head"]), progress=False, **way)
    assert same(qparams(model), qparams(other)) == []
    assert session.fed == 3 and session.record.batches == 3 and session.phase == "ended"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_record_is_that_of_whole_passes(family):
    data = make_batches(3)
    whole = fed(Session(make_model(family), data, scheme="INT8_STATIC")).record
    blocks = fed(Session(make_model(family), data, scheme="INT8_STATIC", pipeline="sequential")).record
    assert record_equal(whole, blocks)
    for key, result in whole.results.items():
        assert result.reason == blocks.results[key].reason
        assert result.scale is None or torch.equal(result.scale, blocks.results[key].scale), key


def test_behind_quantized_blocks_the_record_is_another_and_says_so(tmp_path):
    data = make_batches(2)
    options = dict(scheme="INT8_STATIC", pipeline="sequential")
    floats = fed(Session(make_model("llama_gqa"), data, **options)).record
    quantized = fed(Session(make_model("llama_gqa"), data, propagate="quantized", **options)).record
    assert not record_equal(floats, quantized) and "behind quantized blocks" in repr(quantized)
    assert floats.about.propagate == "float" and "propagate" not in repr(floats)
    again = CalibrationRecord.load(quantized.save(tmp_path / "run.record"))
    assert record_equal(again, quantized) and again.about.propagate == "quantized"


def test_progress_counts_blocks_and_feeding_again_has_to_go_back_first():
    session = Session(make_model("llama_gqa"), make_batches(2), pipeline="sequential")
    told = []
    session.listen(lambda what: told.append((what, session.progress.done, session.progress.unit)))
    fed(session)
    blocks = len(session.model.model.layers)
    assert [t for t in told if t[0] == "batch"] == [("batch", n, "blocks") for n in range(1, blocks + 1)]
    assert session.progress.total == blocks and session.progress.tokens == session.record.tokens
    with pytest.raises(SessionError, match="cannot feed.*block by block, all batches pass together"): session.feed()
    session.back()
    session.feed(1)
    assert session.fed == 1 and session.record.batches == 1 and session.code[-1] == "feed(1)"


def test_back_takes_the_scales_of_blocks_with_it():
    session = Session(make_model("llama_gqa"), make_batches(2), pipeline="sequential", propagate="quantized")
    session.initialize()
    session.start()
    before = snapshot(session.model)
    session.feed_all()
    assert changes(before, snapshot(session.model))
    session.back()
    assert changes(before, snapshot(session.model)) == [] and session.fed == 0 and session.record.batches == 0
    session.feed_all()
    session.end()
    other = fed(Session(make_model("llama_gqa"), make_batches(2), pipeline="sequential", propagate="quantized"), "end")
    assert session.scales().equals(other.scales())


@pytest.mark.parametrize("propagate", ["float", "quantized"])
def test_a_bad_batch_leaves_nothing(propagate):
    data = [*make_batches(2), dict(input_ids=torch.tensor([[99_999]]))]
    session = Session(make_model("llama_gqa"), data, pipeline="sequential", propagate=propagate)
    session.initialize()
    session.start()
    before, record_before = snapshot(session.model), session.record
    with pytest.raises(ValueError, match="input_ids go from"): session.feed_all()
    assert changes(before, snapshot(session.model)) == [] and session.record is record_before and session.fed == 0
    assert session.phase == "started" and isinstance(session.error, ValueError) and session.legal()["feed"] is None
    session.feed(2)
    assert session.fed == 2


def test_stop_in_the_middle_leaves_nothing():
    session = Session(make_model("llama_gqa"), make_batches(2), pipeline="sequential")
    session.initialize()
    session.start()
    before = snapshot(session.model)
    def stop_after_a_block(what):
        if what == "batch": session.stop()
    unlisten = session.listen(stop_after_a_block)
    session.in_background().join()
    unlisten()
    assert session.error is None and session.fed == 0 and session.phase == "started" and not session.running
    assert changes(before, snapshot(session.model)) == []
    session.feed_all()
    assert session.fed == 2


def test_its_python_repeats_it_and_production_is_told():
    way = dict(pipeline="sequential", propagate="quantized")
    session = fed(Session(make_model("llama_gqa"), make_batches(2), **way), "end")
    assert "pipeline='sequential', propagate='quantized')" in session.script()
    assert "pipeline='sequential')" in session.production()
    assert "this session quantized ones: scales differ" in session.production()
    plain = Session(make_model("llama_gqa"), make_batches(2))
    assert "pipeline=" not in plain.script() and "pipeline='basic')" in plain.production()


def test_a_record_that_was_made_another_way_is_not_replayed():
    model, data = make_model("llama_gqa"), make_batches(2)
    quantized = fed(Session(model, data, pipeline="sequential", propagate="quantized")).record
    reset_quantization(model)
    session = Session(model, data, record=quantized)
    session.initialize()
    with pytest.warns(UserWarning, match="propagate='quantized', this session has 'eager' and 'float'"):
        session.start()
    assert session.phase == "started" and not session.replayed
    session.reset()
    other = Session(model, data, record=record(model, data, scheme="FP8", attention="model", progress=False))
    other.initialize()
    with pytest.warns(UserWarning, match="attention='sdpa'"): other.start()
    assert other.phase == "started"
    other.reset()
    same_way = Session(model, data, record=quantized, pipeline="sequential", propagate="quantized")
    same_way.initialize()
    same_way.start()
    assert same_way.phase == "fed" and same_way.replayed


def test_the_workbench_passes_it_on():
    bench = Workbench(make_model("llama_gqa"), make_batches(2), pipeline="sequential", propagate="quantized")
    fed(bench, "end")
    assert bench.session.pipeline == "sequential" and bench.record.about.propagate == "quantized"
    bench.close()


@pytest.mark.parametrize("options, words", [
    (dict(pipeline="blocks"), "pipeline='blocks' is unknown; it must be one of 'basic', 'sequential'"),
    (dict(propagate="quantized"), "propagate='quantized' needs pipeline='sequential', got pipeline='basic'"),
    (dict(pipeline="sequential", propagate="int8"), "propagate='int8' is unknown"),
])
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words): Session(make_model("llama_gqa"), make_batches(1), **options)


def test_an_observer_that_depends_on_order_sees_the_same_order():
    assert "minmax" in Observer.observers()
    data = make_batches(4)
    options = dict(scheme=dict(input_activations=dict(num_bits=8, observer="minmax"), weights=dict(num_bits=8)))
    whole = fed(Session(make_model("llama_gqa"), data, **options), "end")
    blocks = fed(Session(make_model("llama_gqa"), data, pipeline="sequential", **options), "end")
    assert whole.scales().equals(blocks.scales())


@pytest.mark.parametrize("pipeline", ["basic", "sequential"])
def test_a_feed_that_finds_the_model_busy_takes_nothing_from_its_user(pipeline):
    "What somebody else puts on the model, who has it when a feed begins, is not undone with the feed."
    session = Session(make_model("llama_gqa"), make_batches(2), pipeline=pipeline)
    session.initialize()
    session.start()
    module = session.model.model.layers[0].mlp.up_proj
    def busy(*_):
        module.note = "theirs"
        raise ModelBusyError("somebody is feeding this model")
    with patch("qcal_nb.session.session.at_work", busy), pytest.raises(ModelBusyError): session.feed_all()
    assert module.note == "theirs" and session.fed == 0 and session.phase == "started" and not session.running
