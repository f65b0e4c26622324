"""Models whose parameters lie on the CPU or on disk: the same scales, the same quantized outputs, and nothing left of
it afterwards."""
import os
import warnings

import accelerate
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from helpers import make_batches, make_model, offload, outputs, qparams
from loguru import logger

from qcal_nb.calibration import update_qparams
from qcal_nb.lifecycle import QuantizationModifier, State, phase_of, reset_quantization
from qcal_nb.pipelines import calibrate

TWO_BITS = dict(
    config_groups={
        "g": QuantizationScheme(targets=["Linear"], weights=dict(num_bits=2, type="int", strategy="channel"))
    },
    ignore=["lm_head"],
)
KV = dict(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
RECIPES = {
    "FP8": dict(scheme="FP8", ignore=["lm_head"]),
    "two bits": TWO_BITS,
    "NVFP4 mse": dict(scheme="NVFP4", weight_observer="memoryless_mse", ignore=["lm_head"]),
    "cache": dict(kv_cache_scheme=KV, targets=[]),
    "imatrix": dict(scheme="NVFP4A16", weight_observer="imatrix_mse", ignore=["lm_head"]),
}


def files(folder): return sorted(f for f in os.listdir(folder)) if os.path.isdir(folder) else []


def stored(model):
    "What lies where: the objects behind parameters, offloaded or not."
    return {
        (n, k): id(v) for n, m in model.named_modules()
        for k, v in getattr(m._parameters, "offloaded_values", m._parameters).items()
    }


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("pipeline", ["basic", "sequential"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_scales_and_outputs_and_back(recipe, pipeline, kind, tmp_path):
    "Two bits would show if a weight went unquantized."
    data, plain = make_batches(), make_model("llama_gqa")
    calibrate(plain, data, QuantizationModifier(**RECIPES[recipe]), progress=False, pipeline=pipeline)
    right, quantized = qparams(plain), outputs(plain, data[0])
    model = offload(make_model("llama_gqa"), kind, tmp_path)
    before, exact, lying = stored(model), outputs(model, data[0]), files(tmp_path)
    calibrate(model, data, QuantizationModifier(**RECIPES[recipe]), progress=False, pipeline=pipeline)
    found = qparams(model)
    assert right.keys() == found.keys() and all(torch.equal(v, found[k]) for k, v in right.items())
    assert torch.equal(outputs(model, data[0]), quantized) and not torch.equal(quantized, exact)
    reset_quantization(model)
    assert stored(model) == before and files(tmp_path) == lying and torch.equal(outputs(model, data[0]), exact)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_quantized_outputs_are_handed_on_from_offloaded_blocks(kind, tmp_path):
    found = []
    for where in (None, kind):
        model = make_model("llama_gqa")
        if where: offload(model, kind, tmp_path)
        calibrate(
            model,
            make_batches(),
            QuantizationModifier(scheme="FP8", weight_observer="mse", ignore=["lm_head"]),
            pipeline="sequential",
            propagate="quantized",
            progress=False,
        )
        found.append(qparams(model))
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_a_failed_start_and_a_refused_end_leave_it_as_it_was(kind, tmp_path):
    model = offload(make_model("llama_gqa"), kind, tmp_path)
    before, lying, modifier = stored(model), files(tmp_path), QuantizationModifier(scheme="W4A16", ignore=["lm_head"])
    with pytest.raises(ValueError, match="does not fit"): modifier.initialize_quantization(model)
    assert stored(model) == before and files(tmp_path) == lying
    modifier = QuantizationModifier(scheme="FP8", ignore=["lm_head"])
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    with pytest.raises(ValueError, match="14 scales are not computed"): modifier.on_end(State(model))
    assert phase_of(model) == "calibrating"
    reset_quantization(model)
    assert stored(model) == before and files(tmp_path) == lying


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_gets_a_weight_of_its_own(tied, tmp_path):
    model = make_model("llama_tied" if tied else "llama_gqa")
    offload(model, "cpu")
    before, exact = stored(model), outputs(model, make_batches()[0])
    calibrate(model, make_batches(), QuantizationModifier(scheme="FP8"), progress=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    reset_quantization(model)
    assert stored(model) == before and torch.equal(outputs(model, make_batches()[0]), exact)


def test_both_sides_or_only_what_was_brought_back():
    model = offload(make_model("llama_gqa"), "cpu")
    modifier = QuantizationModifier(scheme="W8A8", ignore=["lm_head"])
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    layer = model.model.layers[0].mlp.up_proj
    layer.weight_observer(layer.weight)
    update_qparams(layer, "weight")
    assert torch.equal(layer._parameters.offloaded_values["weight_scale"], layer.weight_observer.get_qparams()["scale"])


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied"])
def test_a_model_that_accelerate_offloads(name, kind, tmp_path):
    data, plain = make_batches(), make_model(name)
    calibrate(plain, data, QuantizationModifier(scheme="FP8"), progress=False)
    model = make_model(name)
    if kind == "cpu": accelerate.cpu_offload(model, execution_device="cpu")
    else: accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    exact, lying = outputs(model, data[0]), files(tmp_path)
    hooks = {n: (m._hf_hook, vars(m._hf_hook).copy()) for n, m in model.named_modules() if hasattr(m, "_hf_hook")}
    logged = []
    sink = logger.add(logged.append, level="WARNING")  # where compressed-tensors warns, once for each weight
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        calibrate(model, data, QuantizationModifier(scheme="FP8"), progress=False)
    logger.remove(sink)
    assert logged == []
    assert ["accelerate wrote 21 weights to disk" in str(w.message) for w in said] == [True] * (kind == "disk")
    assert not any(hasattr(m, "_hf_hook") for m in model.modules())
    assert all(torch.equal(v, qparams(model)[k]) for k, v in qparams(plain).items())
    assert torch.equal(outputs(model, data[0]), outputs(plain, data[0]))
    reset_quantization(model)
    assert {n: (m._hf_hook, vars(m._hf_hook)) for n, m in model.named_modules() if hasattr(m, "_hf_hook")} == hooks
    assert files(tmp_path) == lying
    assert torch.equal(outputs(model, data[0]), exact)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_what_cannot_be_converted_is_said_and_leaves_nothing_changed(kind, tmp_path, monkeypatch):
    def half_way(model):
        accelerate.hooks.remove_hook_from_module(model.model.layers[0].mlp.up_proj)
        raise RuntimeError("no such place")
    monkeypatch.setattr("qcal_nb.modeling.offload.from_accelerate", half_way)
    model = make_model("llama_gqa")
    if kind == "cpu": accelerate.cpu_offload(model, execution_device="cpu")
    else: accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    exact, lying = outputs(model, make_batches()[0]), files(tmp_path)
    with pytest.raises(ValueError, match="offloaded by accelerate in a way that cannot be converted: no such place"):
        QuantizationModifier(scheme="FP8").initialize_quantization(model)
    assert phase_of(model) == "original" and torch.equal(outputs(model, make_batches()[0]), exact)
    assert files(tmp_path) == lying
