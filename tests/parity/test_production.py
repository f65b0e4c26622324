"""What the Code panel hands to production: its script, run as it stands, gives the session's scales with
llm-compressor's own `oneshot`."""
import pytest
import torch
from helpers import qparams

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.session import Session

DOWN = dict(targets=["re:.*down_proj"], weights=dict(num_bits=4, strategy="channel", observer="memoryless_mse"))
REST = dict(targets=["Linear"], weights=dict(num_bits=8), input_activations=dict(num_bits=8, dynamic=False))
RECIPES = {
    "FP8": dict(scheme="FP8"), "W4A16": dict(scheme="W4A16"),
    "inputs by mse": dict(scheme="INT8_STATIC", input_observer="mse"),
    "two groups": dict(config_groups={"a": DOWN, "b": REST})
}


def session_of(recipe):
    model, tokenizer = load_tiny_llama()
    session = Session(
        model, calibration_texts()[:3], tokenizer, recipe=QuantizationModifier(**recipe, ignore=["lm_head"]),
        max_length=64
    )
    for step in ("initialize", "start", "feed_all", "end"): getattr(session, step)()
    return session


@pytest.mark.parity
@pytest.mark.parametrize("name", RECIPES)
def test_the_script_for_llm_compressor_gives_the_sessions_scales(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session, space = session_of(RECIPES[name]), {}
    exec(compile(session.production(), "production", "exec"), space)
    mine, theirs = qparams(session.model), qparams(space["model"])
    assert mine and mine.keys() == theirs.keys() and [n for n in mine if not torch.equal(mine[n], theirs[n])] == []


@pytest.mark.parity
@pytest.mark.parametrize("observer", ["percentile", "entropy", "histogram_mse"])
def test_an_observer_that_the_reference_lacks_is_named_and_the_reference_refuses_it(observer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = session_of(dict(scheme="INT8_STATIC", input_observer=observer)).production()
    assert text.startswith(f"# This stops: llm-compressor has no observer {observer}: calibrate with qcal_nb; "
                           "the checkpoint of save_quantized runs in vLLM and transformers\n")
    with pytest.raises(Exception, match=observer.replace("_", "-")): exec(compile(text, "production", "exec"), {})
