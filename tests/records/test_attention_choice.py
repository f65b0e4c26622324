"""Which attention a recording runs with: eager, or the model's own; and that the record says so."""
import pytest
import torch
from helpers import make_batches, make_model

from qcal_nb import CalibrationRecord, Workbench, load_tiny_llama, record
from qcal_nb.lifecycle import phase_of
from qcal_nb.models import calibration_texts
from qcal_nb.records import record_equal
from qcal_nb.report import facts
from qcal_nb.session import Session

QUIET = dict(progress=False)


@pytest.fixture
def used(monkeypatch):
    "The implementations that the attention modules of a Llama were run with."
    from transformers.models.llama.modeling_llama import LlamaAttention
    seen, forward = [], LlamaAttention.forward

    def noted(self, *args, **kwargs):
        seen.append(self.config._attn_implementation)
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(LlamaAttention, "forward", noted)
    return seen


@pytest.mark.parametrize("attention, name", [("eager", "eager"), ("model", "sdpa")])
def test_the_one_that_was_asked_for_runs_and_is_written_down(used, tmp_path, attention, name):
    model, batches = make_model("llama_gqa"), make_batches(2)
    assert model.config._attn_implementation == "sdpa"
    run = record(model, batches, attention=attention, **QUIET)
    assert set(used) == {name} and run.about.attention == name and facts(run)["attention"] == name
    assert model.config._attn_implementation == "sdpa" and phase_of(model) == "original"
    assert record_equal(CalibrationRecord.load(run.save(tmp_path / "r.safetensors")), run)
    assert ("with sdpa attention" in repr(run)) == (attention == "model")


def test_records_of_two_attentions_do_not_merge():
    model, batches = make_model("llama_gqa"), make_batches(2)
    eager = record(model, batches[:1], batch_indices=[0], **QUIET)
    own = record(model, batches[1:], batch_indices=[1], attention="model", **QUIET)
    with pytest.raises(ValueError, match="two runs: attention is 'eager' in one and 'sdpa' in the other"): eager | own


def test_a_session_feeds_with_it_and_says_so(used):
    model, tokenizer = load_tiny_llama()
    session = Session(model, calibration_texts()[:1], tokenizer, "INT8_STATIC", attention="model", max_length=16)
    session.initialize()
    session.start()
    used.clear()
    session.feed_all()
    assert set(used) == {"sdpa"} and session.record.about.attention == "sdpa"
    assert "attention='model'" in session.script() and "scales may differ" in session.production()
    session.reset()
    bench = Workbench(model, calibration_texts()[:1], tokenizer, attention="model")
    assert bench.session.attention == "model"
    bench.close()


def test_a_wrong_one_is_refused_before_anything_runs(used):
    model, tokenizer = load_tiny_llama()
    said = "attention='flash' must be 'eager' .* or 'model'"
    with pytest.raises(ValueError, match=said):
        record(model, calibration_texts()[:1], tokenizer=tokenizer, attention="flash", **QUIET)
    with pytest.raises(ValueError, match=said): Session(model, calibration_texts()[:1], tokenizer, attention="flash")
    assert not used and phase_of(model) == "original"


def test_a_module_without_attention_of_its_own_is_recorded_as_eager():
    run = record(torch.nn.Sequential(torch.nn.Linear(4, 4)), [torch.randn(2, 4)], attention="model", **QUIET)
    assert run.about.attention == "eager"
