"""Gradients in a session: the same as `record`'s, shared by its snapshots, and part of its script."""
import pytest
from helpers import differences, fingerprint, make_batches, make_model

from qcal_nb.evaluate import forecast
from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.pipelines import calibrate
from qcal_nb.records import gradient_collector, record
from qcal_nb.records.gradient_tree import same_gradients
from qcal_nb.session import Session, SessionError
from tests.records.samples import QUIET

RECIPE = dict(scheme="INT8_STATIC", ignore=["lm_head"])


def fed(n=None, **options):
    session = Session(make_model("llama_gqa"), make_batches(6), recipe=QuantizationModifier(**RECIPE), **options)
    session.initialize()
    session.start()
    if n is None: session.feed_all(gradients=True)
    else: session.feed(n, gradients=True)
    return session


def test_they_are_those_of_a_record():
    session = fed()
    made = record(make_model("llama_gqa"), make_batches(6), gradients=True, **QUIET)
    assert session.record.labels == made.labels and session.record.gradients.keys() == made.gradients.keys()
    assert all(same_gradients(g, made.gradients[name]) for name, g in session.record.gradients.items())


def test_scales_are_as_without_gradients():
    session = fed()
    session.end()
    plain = calibrate(make_model("llama_gqa"), make_batches(6), QuantizationModifier(**RECIPE), progress=False)
    scales = {k: v for k, v in plain.state_dict().items() if k.endswith("scale")}
    mine = session.model.state_dict()
    assert scales and all((mine[name] == value).all() for name, value in scales.items())


def test_a_batch_that_memory_does_not_hold_leaves_what_was_fed(monkeypatch):
    session = fed(3)
    before = fingerprint(session.model)
    monkeypatch.setattr(gradient_collector, "free_bytes", lambda device: 1_000)
    with pytest.raises(ValueError, match="MB are free; use a smaller batch_size or max_length"):
        session.feed(gradients=True)
    assert session.fed == session.record.batches == 3 and differences(before, fingerprint(session.model)) == []
    session.feed()
    assert session.fed == 4


def test_a_step_back_takes_them_back_and_snapshots_share_them():
    session = fed(3)
    before = session.record
    session.feed(1)
    assert session.record.gradients is not None and session.record.labels == before.labels and session.fed == 4
    name = "model.layers.1.mlp.down_proj"
    assert session.record.gradients[name] is before.gradients[name]
    session.feed(2, gradients=True)
    assert sum(session.record.labels) == sum(before.labels) * 5 // 3
    session.back()
    session.back()
    assert session.record is before
    session.back()
    assert not session.record.gradients


def test_its_script_says_so_and_a_forecast_follows():
    session = fed()
    assert "session.feed_all(gradients=True)" in session.script()
    session.reset()
    table = forecast(session.record, session.model, ["INT8_STATIC", "W8A8"])
    assert (table.kl > 0).all() and list(table.why) == ["", ""]


def test_what_cannot_be_is_refused_and_leaves_the_session():
    session = Session(make_model("llama_gqa"), make_batches(6), recipe=QuantizationModifier(**RECIPE),
                      pipeline="sequential")
    session.initialize()
    session.start()
    before = fingerprint(session.model)
    with pytest.raises(SessionError, match="gradients need whole passes"): session.feed(gradients=True)
    with pytest.raises(TypeError, match="gradients=1 must be True or False"): session.feed_all(gradients=1)
    assert differences(before, fingerprint(session.model)) == [] and not session.running and session.fed == 0
    session.feed_all()
    reset_quantization(session.model)


def test_a_model_without_predictions_is_refused_before_a_batch():
    session = Session(make_model("bert"), make_batches(2), recipe=QuantizationModifier(**RECIPE))
    session.initialize()
    session.start()
    with pytest.raises(TypeError, match="must be a causal language model"): session.feed(gradients=True)
    session.feed()
    assert session.fed == 1 and not session.record.gradients
