"""Forecasts beside what was measured, on the embedded model; and what cannot be forecast, in words."""
import warnings
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model

from qcal_nb.evaluate import compare_schemes, forecast, forecast_modules
from qcal_nb.forecasts import STATE_WORDS, allocate, spare
from qcal_nb.records.module_costs import quantized, weight_results
from qcal_nb.evaluate.sensitivities import Probe
from qcal_nb.lifecycle import LifecycleError, QuantizationModifier
from qcal_nb.models import calibration_texts, heldout_texts, load_tiny_llama
from qcal_nb.pipelines import calibrate
from qcal_nb.records import record
from tests.records.samples import QUIET

LENGTH = 256
BLOCKS = dict(weights=dict(num_bits=8, type="float", symmetric=True, strategy="block", block_structure=[32, 32]))
SCHEMES = ["W8A16", "FP8_DYNAMIC", "W8A8", "FP8", "INT8_STATIC", "W6A16", "W4A16", "NVFP4", "MXFP4"]


def rank_correlation(a, b):
    "Spearman's."
    return np.corrcoef(pd.Series(list(a)).rank(), pd.Series(list(b)).rank())[0, 1]


def of_length(tokenizer, texts, n):
    "Token ids of texts that have that many, cut to it."
    found = [tokenizer(text, return_tensors="pt").input_ids[:, :LENGTH] for text in texts]
    return [ids for ids in found if ids.shape[1] == LENGTH][:n]


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = load_tiny_llama()
    data, held_out = of_length(tokenizer, calibration_texts(), 10), of_length(tokenizer, heldout_texts(), 6)
    return model, data, held_out, record(model, data, gradients=True, **QUIET)


def test_every_scheme_is_forecast_within_the_bar(tiny):
    model, data, held_out, made = tiny
    before = fingerprint(model)
    table = forecast(made, model, SCHEMES).set_index("scheme")
    assert differences(before, fingerprint(model)) == []
    both = compare_schemes(model, data, SCHEMES, eval_data=held_out, forecast=table.reset_index(), **QUIET)
    measured = both.set_index("scheme")
    assert list(both.columns).index("forecast") == list(both.columns).index("kl") + 1
    assert np.isnan(measured.forecast["original"]) and measured.state["original"] == ""
    for name in SCHEMES:
        row = table.loc[name]
        assert measured.forecast[name] == row.kl and measured.state[name] == row.state
        assert row.why == "" and row.state == "estimate" and row.spread < 2
        assert 0.80 < row.kl / measured.kl[name] < 1.15, (name, row.kl, measured.kl[name])
        assert row.weights + row.inputs == pytest.approx(row.kl)
        assert row.weight_bytes == measured.weight_bytes[name]


@pytest.mark.parametrize("length, is_said", [(64, True), (200, False), (LENGTH, False)])
def test_texts_of_another_length_are_said(tiny, length, is_said):
    model, data, held_out, made = tiny
    said = forecast(made, model, ["W8A16"])
    assert said.attrs["tokens_per_text"] == LENGTH
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        short = [ids[:, :length] for ids in held_out[:2]]
        compare_schemes(model, None, ["W8A16"], eval_data=short, forecast=said, **QUIET)
    words = [str(one.message) for one in caught if "the forecast was made from" in str(one.message)]
    assert len(words) == is_said and all("texts of about 256 tokens, eval_data has about 64:" in one for one in words)


@pytest.mark.parametrize("scheme", ["W4A16", "INT8_STATIC"])
def test_modules_are_ranked_as_measured(tiny, scheme):
    model, data, held_out, made = tiny
    table = forecast_modules(made, model, scheme).set_index("module")
    whole = forecast(made, model, [scheme])
    assert table.kl.sum() == pytest.approx(whole.kl[0]) and table.share.sum() == pytest.approx(1)
    assert whole.worst[0] == table.kl.idxmax()
    twin, _ = load_tiny_llama()
    calibrate(twin, data, QuantizationModifier(scheme=scheme, ignore=["lm_head"]), progress=False)
    probe = Probe(twin, [dict(input_ids=ids) for ids in held_out[:3]])
    measured = [probe([name]).kl for name in table.index]
    assert rank_correlation(table.kl, measured) >= 0.90


def test_weights_are_quantized_as_calibrate_does_it():
    model = make_model("llama_gqa")
    made = record(model, make_batches(5), gradients=True, **QUIET)
    for scheme in ("FP8_DYNAMIC", "W8A8", "NVFP4A16", "MXFP4", ("W4A16", dict(group_size=32)), BLOCKS):
        twin = make_model("llama_gqa")
        modifier = QuantizationModifier(scheme=scheme, ignore=["lm_head"])
        calibrate(twin, None, modifier, progress=False)
        names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
        args, = (group.weights for group in modifier.resolved_config.config_groups.values())
        results = weight_results(made, {name: model.get_submodule(name).weight.detach() for name in names}, args)
        for name in names:
            found, own = results[name], twin.get_submodule(name)
            assert torch.equal(found.scale, own.weight_scale), (scheme, name)
            shared = getattr(own, "weight_global_scale", None)
            assert shared is None or torch.equal(found.global_scale.reshape(-1), shared.reshape(-1))
            assert quantized(own.weight.detach(), found).shape == own.weight.shape


def test_a_planted_sink_token_keeps_the_bar():
    """A first token whose embedding is ten times the others'; a hundred times would leave no model to speak of. With
    ten texts the forecast of W8A8 moves between 0.72 and 0.97 of what is measured, by the labels that are drawn."""
    model, tokenizer = load_tiny_llama()
    data = of_length(tokenizer, calibration_texts(), 20)
    held_out = of_length(tokenizer, heldout_texts(), 8)
    first = int(data[0][0, 0])
    with torch.no_grad(): model.model.embed_tokens.weight[first] *= 10
    made = record(model, data, gradients=True, **QUIET)
    names = ["FP8_DYNAMIC", "W8A8", "W6A16"]
    table = forecast(made, model, names).set_index("scheme")
    measured = compare_schemes(model, data, names, eval_data=held_out, **QUIET).set_index("scheme")
    for name in names: assert 0.75 < table.kl[name] / measured.kl[name] < 1.15, name


def test_one_text_that_costs_much_raises_the_spread_and_not_the_forecast(tiny):
    model, data, _, made = tiny
    plain = forecast(made, model, ["W8A8"])
    heavy = record(model, data, gradients=True, **QUIET)
    name = "model.layers.0.mlp.down_proj"
    g = heavy.gradients[name]
    for sums in g.sums: sums[3] *= 1e4       # the part of two texts
    g.output[3] *= 1e4
    table = forecast(heavy, model, ["W8A8"])
    assert table.spread[0] > 2 > plain.spread[0]
    assert table.kl[0] == pytest.approx(plain.kl[0], rel=0.1)


def test_experts_are_forecast():
    model = make_model("mixtral")
    made = record(model, make_batches(5), gradients=True, scheme=QuantizationModifier(scheme="FP8_DYNAMIC",
                  ignore=["lm_head"]), **QUIET)
    before = fingerprint(model)
    table = forecast_modules(made, model, "FP8_DYNAMIC")
    assert table.module.str.contains("experts").any() and (table.kl >= 0).all() and table.kl.sum() > 0
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("scheme, why", [
    (QuantizationModifier(scheme="FP8", ignore=["lm_head"], kv_cache_scheme=dict(num_bits=8, type="float")),
     "the cost of a quantized KV cache is not forecast"),
    (QuantizationModifier(scheme="INT8_STATIC", input_observer="mse", ignore=["lm_head"]),
     "has no scale of mse in the record"),
    (QuantizationModifier(scheme="W4A16", weight_observer="imatrix_mse", ignore=["lm_head"]), "imatrix_mse"),
    (("W4A16", dict(group_size=77)), "group_size is 77"),
    (QuantizationModifier(scheme="FP8_DYNAMIC", targets=["Embedding"]), "Embedding"),
])
def test_what_cannot_be_told_is_a_row_that_says_why(tiny, scheme, why):
    model, *_, made = tiny
    row = forecast(made, model, {"it": scheme, "W8A8": "W8A8"}).iloc[0]
    assert why in row.why and np.isnan(row.kl)
    with pytest.raises(ValueError, match="it|INT8|W4A16|FP8"): forecast_modules(made, model, scheme)


def test_refusals(tiny):
    model, data, _, made = tiny
    with pytest.raises(TypeError, match="forecast must be what forecasts.forecast returned, got CalibrationRecord"):
        compare_schemes(model, data, ["FP8"], eval_data=data, forecast=made, **QUIET)
    with pytest.raises(TypeError, match="record must be a CalibrationRecord"): forecast(model, made, ["FP8"])
    with pytest.raises(ValueError, match="the record has no gradients"):
        forecast(made.without_gradients(), model, ["FP8"])
    few = record(model, data[:3], gradients=True, **QUIET)
    with pytest.raises(ValueError, match="at least 5 batches"): forecast(few, model, ["FP8"])
    other = deepcopy(model)
    with torch.no_grad(): other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the weight of model.layers.2.mlp.up_proj is not the one that was recorded"):
        forecast(made, other, ["FP8"])
    calibrate(other, None, QuantizationModifier(scheme="FP8_DYNAMIC", ignore=["lm_head"]), progress=False)
    with pytest.raises(LifecycleError, match="needs the unquantized model"): forecast(made, other, ["FP8"])


def moe():
    "A mixture of experts whose inner width no group of 128 divides."
    model = make_model("mixtral")
    return model, record(model, make_batches(5), gradients=True, **QUIET)


def test_where_tokens_choose_experts_a_forecast_is_no_estimate():
    model, made = moe()
    table = forecast(made, model, ["FP8_DYNAMIC", "W8A8"])
    assert set(table.state) == {"routed"} and "choose other experts" in STATE_WORDS["routed"]
    assert forecast_modules(made, model, "W8A8").attrs["state"] == "routed"
    assert spare(made, model, "W8A8", 1e-9).state == "routed"
    assert "tokens that now choose other experts are not counted" in repr(allocate(made, model, "1 GB", {"a": "W8A8"}))


def test_a_scheme_that_does_not_fit_experts_is_said_beside_those_that_do():
    model, made = moe()
    before = fingerprint(model)
    table = forecast(made, model, ["W4A16", "W8A8"]).set_index("scheme")
    assert "group_size" in table.why["W4A16"] and np.isnan(table.kl["W4A16"]) and table.kl["W8A8"] > 0
    with pytest.raises(ValueError, match="W4A16"): forecast_modules(made, model, "W4A16")
    with pytest.raises(ValueError, match="W4A16"): spare(made, model, "W4A16")
    assert differences(before, fingerprint(model)) == []


def test_nothing_is_left_where_everything_is_spared(tiny):
    model, _, _, made = tiny
    found = spare(made, model, "W8A8", 1e-12)
    assert len(found.modules) == 28 and found.kl == 0.0
    assert repr(found) == "Spared(28 modules: nothing is left quantized)"


def test_too_few_batches_are_said_when_they_are_recorded():
    with pytest.warns(UserWarning, match="a forecast needs at least 5 batches"):
        record(make_model("llama_gqa"), make_batches(3), gradients=True, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record(make_model("llama_gqa"), make_batches(5), gradients=True, **QUIET)


def test_forecasts_of_a_record_are_a_line(tiny):
    made = tiny[3]
    assert repr(made.forecasts).startswith("Forecasts(recorded: 28 modules") and "tensor" not in repr(made.forecasts)
