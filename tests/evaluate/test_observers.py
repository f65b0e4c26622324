"""compare_observers: the noise of each observer is what the module itself makes."""
import math

import pytest
from helpers import differences, fingerprint, make_model

from qcal_nb import analysis
from qcal_nb.evaluate import schemes as scheme_comparison
from qcal_nb.analysis.observers import OBSERVER_COLUMNS
from qcal_nb.evaluate.divergence import eval_batches
from qcal_nb.evaluate import compare_observers
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.pipelines import calibrate
from qcal_nb.records import CalibrationRecord
from qcal_nb.evaluate.schemes import evaluated
from tests.evaluate.samples import QUIET, W4

STATIC = {
    "W8A8": {}, "FP8_BLOCK": {}, "W4A16": {}, "NVFP4A16": {}, "MXFP4A16": {}, "FP8": {}, "W4A16_ASYM": {},
    "INT8_STATIC": {}
}


@pytest.mark.parametrize("scheme", STATIC)
def test_noise_is_what_the_module_itself_makes(scheme):
    """Each granularity: signal and noise of weights and inputs, against the quantized model's own quantization of the
    same tensors."""
    model, tokenizer = load_tiny_llama()
    texts = [t[:200] for t in calibration_texts()[:2]]
    modifier = QuantizationModifier(scheme=scheme, ignore=["lm_head"], weight_observer="memoryless_minmax")
    asked = "static_minmax" if scheme in ("FP8", "INT8_STATIC") else "memoryless_minmax"
    table = compare_observers(model, texts, [asked], scheme=modifier, tokenizer=tokenizer, **QUIET)
    table = table[(table.base_name == "weight") | (asked == "static_minmax")]
    fixed = dict(input_observer="static_minmax") if asked == "static_minmax" else {}
    calibrate(model, texts, modifier.model_copy(update=fixed), tokenizer=tokenizer, **QUIET)
    damage = evaluated(model, eval_batches(texts, tokenizer))[2]
    for row in table.itertuples():
        signal, noise = damage.powers[f"{row.module}.{row.base_name}"]
        assert row.reason == "" and row.bound_db == 0, row.module
        assert math.isclose(row.sqnr_db, scheme_comparison.sqnr_db(signal, noise), abs_tol=1e-3), row.module


def test_local_scales_are_found_while_running(data):
    model = make_model("llama_gqa")
    table = compare_observers(model, data, ["static_minmax"], scheme="NVFP4", base_names=["input"], **QUIET)
    calibrate(
        model, data, QuantizationModifier(scheme="NVFP4", ignore=["lm_head"], input_observer="static_minmax"), **QUIET
    )
    damage = evaluated(model, data)[2]
    for row in table.itertuples():
        assert math.isnan(row.scale)
        assert math.isclose(row.sqnr_db, scheme_comparison.sqnr_db(*damage.powers[f"{row.module}.input"]), abs_tol=1e-3)


def test_rows_and_columns(llama, data):
    names = ["static_minmax", ("percentile", {"percentile": 99.0}), "mse"]
    table = compare_observers(llama, data, names, base_names=["input", "weight", "output"], **QUIET)
    assert list(table.columns) == OBSERVER_COLUMNS and len(table) == 14 * 3 * 3 and table.attrs["batches"] == 2
    best = table[table.highest_sqnr]
    where = ["module", "base_name"]
    assert len(best) == 14 * 3
    assert best.set_index(where).sqnr_db.sort_index().equals(table.groupby(where).sqnr_db.max().sort_index())
    clipping = table[table.observer.str.startswith("percentile") & (table.base_name == "input")]
    assert clipping.clipped.between(0.001, 0.03).all() and (table[table.observer == "static_minmax"].clipped == 0).all()


def test_every_module_has_its_own_weight_measured(llama, data):
    "q, k and v are fed the same tensor: what listens to it still concludes about three weights."
    modifier = QuantizationModifier(scheme=W4, ignore=["lm_head"])
    table = compare_observers(llama, data, ["imatrix_mse"], scheme=modifier, base_names=["weight"], **QUIET)
    assert (table.reason == "").all() and table.scale.nunique() == 14


@pytest.mark.parametrize("strategy", ["tensor", "attn_head"])
def test_attention_states(llama, data, strategy):
    scheme = QuantizationModifier(
        config_groups={"a": dict(targets=["LlamaAttention"], input_activations=dict(num_bits=8, strategy=strategy))}
    )
    before = fingerprint(llama)
    table = compare_observers(llama, data, ["static_minmax"], scheme=scheme, base_names=["q", "k", "v"], **QUIET)
    assert len(table) == 6 and (table.reason == "").all() and table.sqnr_db.between(20, 70).all()
    assert differences(before, fingerprint(llama)) == []
    assert (table.scale_min < table.scale_max).all() == (strategy == "attn_head")


def test_nonfinite_values_are_left_out(llama, data):
    llama.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    table = compare_observers(llama, None, ["static_minmax"], base_names=["weight"], **QUIET)
    row = table[table.module == "model.layers.0.mlp.up_proj"].iloc[0]
    assert row.reason == "" and 20 < row.sqnr_db < 60


def test_a_record_in_place_of_a_model_and_the_other_way_round():
    "Two functions have one name: each says where the other is."
    model, run = make_model("llama_gqa"), CalibrationRecord()
    with pytest.raises(TypeError, match="got CalibrationRecord; for a record use qcal_nb.analysis.compare_observers"):
        compare_observers(run, ["a text"])
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM; .* with qcal_nb.evaluate.compare_observers"):
        analysis.compare_observers(model, ["a text"])
    with pytest.raises(TypeError, match="record must be a CalibrationRecord, got int; make one"):
        analysis.compare_observers(3)
