"""Which observers a recording attaches where nobody says so: those that a calibration with the same recipe would."""
import pytest
import torch
from helpers import make_batches, make_model

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.records import record

QUIET = dict(progress=False)
GROUPS = dict(
    mlp=dict(targets=["re:.*mlp.*"], weights=dict(num_bits=4, strategy="channel", observer="mse"),
             input_activations=dict(num_bits=8, observer="minmax")),
    attention=dict(targets=["re:.*self_attn.*_proj"], weights=dict(num_bits=8),
                   input_activations=dict(num_bits=8, observer="percentile", observer_kwargs={"percentile": 99.0})))
OWN = {
    "weights": dict(scheme="FP8", weight_observer="mse"),
    "inputs": dict(scheme="FP8", input_observer="minmax"),
    "outputs": dict(scheme=dict(output_activations=dict(num_bits=8)), output_observer="minmax"),
    "groups": dict(config_groups=GROUPS),
    "cache": dict(scheme="FP8", kv_cache_scheme=dict(num_bits=8, observer="minmax", symmetric=True)),
}


@pytest.mark.parametrize("fields", OWN.values(), ids=OWN)
def test_a_modifiers_own_observers_are_recorded_unless_others_are_asked_for(fields):
    model, data, modifier = make_model("llama_gqa"), make_batches(3), QuantizationModifier(**fields, ignore=["lm_head"])
    names = ["input", "weight", "output", "k", "v"]
    run = record(model, data, scheme=modifier, base_names=names, **QUIET)
    assert record(
        model, data, scheme=modifier, observers=["entropy"], base_names="input", **QUIET
    ).observers == ["entropy"]
    assert all((*key, "static_minmax") in run.results for key in run.tensors)
    calibrate(model, data, modifier, progress=False)
    found = 0
    for name, module in model.named_modules():
        for base_name in names:
            scale = getattr(module, f"{base_name}_scale", None)
            if scale is None: continue
            found += 1
            told = [
                c.scale for (n, b, _), c in run.results.items() if (n, b) == (name, base_name) and c.scale is not None
            ]
            assert any(torch.equal(scale, t) for t in told), (name, base_name)
    assert found >= 14


def test_a_preset_and_no_scheme_are_recorded_with_the_usual_observer():
    model, data = make_model("llama_gqa"), make_batches(1)
    for scheme in (None, "INT8_STATIC"):
        assert record(model, data, scheme=scheme, **QUIET).observers == ["static_minmax"]
