"""While a session feeds, one observer looks for the record and for the model; what each knows is what it would have
known by itself."""
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
from helpers import make_batches, make_model, qparams

from qcal_nb.calibration import observers_in
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.observers import Observer
from qcal_nb.pipelines import calibrate
from qcal_nb.session import Session
from qcal_nb.stats import NonFiniteError

INT8 = dict(num_bits=8, type="int", symmetric=True)
RECIPES = {
    "static_minmax": dict(scheme="INT8_STATIC"),
    "minmax": dict(scheme="INT8_STATIC", input_observer="minmax"),
    "mse": dict(scheme="INT8_STATIC", input_observer="mse"),
    "percentile": dict(scheme="INT8_STATIC", input_observer="percentile"),
    "imatrix": dict(scheme="W4A16", weight_observer="imatrix_mse", group_size=32),
    "groups": dict(scheme="NVFP4"),
    "keys": dict(kv_cache_scheme=dict(num_bits=8, type="float", strategy="attn_head", dynamic=False, symmetric=True)),
}
COUNTED = ("observations", "elements", "batches", "skipped", "nonfinite")


def recipe_of(name, **more): return QuantizationModifier(**RECIPES[name], ignore=["lm_head"], **more)


def fed(model, data, recipe):
    session = Session(model, data, recipe=recipe)
    session.initialize()
    session.start()
    session.feed_all()
    return session


def statistics(model):
    "By place: what an observer on the model knows and counted."
    found = {}
    for observer in observers_in(model):
        known = {name: value for name in observer.statistics if (value := getattr(observer, name, None)) is not None}
        counts = tuple(getattr(observer.counts, name) for name in COUNTED)
        found[observer.module_name, observer.base_name] = known, counts, observer.consumed
    return found


def different(a, b):
    assert a and a.keys() == b.keys()
    return [key for key in a if a[key][1:] != b[key][1:] or a[key][0].keys() != b[key][0].keys()
            or any(not torch.equal(v, b[key][0][n]) or v.dtype != b[key][0][n].dtype for n, v in a[key][0].items())]


CASES = [(name, family) for name in RECIPES for family in ("llama_gqa", "mixtral", "gpt_neox")
         if (name, family) != ("keys", "gpt_neox")]     # which has no cache that can be hooked


@pytest.mark.parametrize("name, family", CASES)
def test_observers_on_the_model_know_what_they_would_have_seen(name, family):
    model, data = make_model(family), make_batches(3)
    alone = deepcopy(model)
    with patch("qcal_nb.session.session.twins_of", return_value=None):
        by_themselves = fed(alone, data, recipe_of(name))
    looked = []
    def see(self, value): looked.append(self)
    with patch.object(Observer, "see", see): together = fed(model, data, recipe_of(name))
    assert all(not observer.hears() for observer in looked)
    assert different(statistics(model), statistics(alone)) == []
    by_themselves.end()
    together.end()
    assert together.scales().equals(by_themselves.scales())


def test_one_tensor_of_three_modules_is_looked_at_once():
    looks = []
    class Counting(Observer.observers()["minmax"]):
        def update_statistics_from_observed(self, observed):
            looks.append(self.module_name)
            super().update_statistics_from_observed(observed)
    Observer.register("counting_minmax")(Counting)
    try:
        model = make_model("llama_gqa")
        recipe = QuantizationModifier(scheme="INT8_STATIC", input_observer="counting_minmax", ignore=["lm_head"])
        session = fed(model, make_batches(2), recipe)
    finally:
        for table in (Observer._classes, Observer._names): del table["countingminmax"]
    # inputs of q, of o, of gate, of down, in each of two layers and of two batches; weights are looked at elsewhere
    assert len(looks) == 4 * 2 * 2 and session.fed == 2


def with_nan(model):
    "A model whose second layer puts out a NaN for one token."
    def spoil(module, args, output):
        output = output.clone()
        output[0, 3, 5] = float("nan")
        return output
    model.model.layers[0].mlp.up_proj.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("policy", ["record", "skip"])
def test_what_is_not_finite_is_left_out_as_calibrate_leaves_it_out(policy):
    data = make_batches(2)
    model, other = with_nan(make_model("llama_gqa")), with_nan(make_model("llama_gqa"))
    recipe = recipe_of("minmax", nonfinite=policy, on_uncalibrated="skip")
    session = fed(model, data, recipe)
    session.end()
    calibrate(other, data, recipe, progress=False)
    a, b = qparams(model), qparams(other)
    assert a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(-1), b[n].nan_to_num(-1)) for n in a)


def test_what_is_not_finite_is_refused_and_leaves_nothing():
    model, data = with_nan(make_model("llama_gqa")), make_batches(2)
    session = Session(model, data, recipe=recipe_of("minmax"))
    session.initialize()
    session.start()
    before = statistics(model)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.down_proj, input: .*calibrate with nonfinite='skip'"):
        session.feed_all()
    assert session.fed == 0 and session.record.batches == 0 and different(statistics(model), before) == []
