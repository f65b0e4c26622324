"""Every preset of compressed-tensors, and ours, is legal on the embedded model: calibrated, run, and taken back."""
import pytest
import torch
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from helpers import differences, fingerprint, outputs, qparams

from qcal_nb.lifecycle import QuantizationModifier, phase_of, reset_quantization
from qcal_nb.models import calibration_texts, load_tiny_llama
from qcal_nb.pipelines import batches, calibrate
from qcal_nb.schemes import preset_names


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load_tiny_llama()
    return model, list(batches(calibration_texts()[:2], tokenizer, max_length=128))


def test_all_presets_are_there():
    assert set(preset_names()) == {*PRESET_SCHEMES, "INT8_STATIC"} and len(PRESET_SCHEMES) >= 30


@pytest.mark.parametrize("name", preset_names())
def test_preset(name, loaded):
    model, data = loaded
    before, exact = fingerprint(model), outputs(model, data[0])
    calibrate(model, data, QuantizationModifier(scheme=name, ignore=["lm_head"]), progress=False)
    assert phase_of(model) == "calibrated"
    scales = {k: v for k, v in qparams(model).items() if k.endswith("_scale")}
    assert all(torch.isfinite(s.float()).all() and (s.float() > 0).all() for s in scales.values())
    assert bool(scales) == (name != "UNQUANTIZED")
    quantized = outputs(model, data[0])
    assert torch.isfinite(quantized).all() and torch.equal(quantized, exact) == (name == "UNQUANTIZED")
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == [] and torch.equal(outputs(model, data[0]), exact)
