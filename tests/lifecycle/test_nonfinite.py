"""Values that are not numbers, or too large for a dtype, never become a scale."""
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from helpers import differences, fingerprint, qparams

from qcal_nb.lifecycle import QuantizationModifier, State, phase_of, reset_quantization
from qcal_nb.stats import NonFiniteError
from qcal_nb.pipelines import calibrate
from tests.lifecycle.walking import run_until


@pytest.mark.parametrize("policy, words", [("raise", None), ("skip", None), ("record", None)])
def test_nonfinite_values(policy, words):
    model, data = torch.nn.Sequential(torch.nn.Linear(8, 8)), [torch.randn(4, 8) for _ in range(3)]
    data[1][2, 5] = float("inf")
    modifier = QuantizationModifier(scheme="FP8", targets="Linear", nonfinite=policy)
    if policy == "raise":
        with pytest.raises(
            NonFiniteError, match=r"0, input: 1 non-finite value, the first \(inf\) at position \(2, 5\) of batch 1"
        ):
            calibrate(model, data, modifier, progress=False)
        assert model[0].input_observer.counts.batches == 1
        return
    calibrate(model, data, modifier, progress=False)
    row = next(r for r in modifier.coverage if r.base_name == "input")
    assert row.nonfinite == 1 and row.skipped == (policy == "skip") and row.first_nonfinite.batch == 1
    assert row.first_nonfinite.position == (2, 5)
    kept = [data[0], data[2]] if policy == "skip" else [torch.where(torch.isfinite(d), d, 0) for d in data]
    assert torch.equal(model[0].input_scale.detach(), (torch.cat(kept).abs().max() / 448).reshape(1))


def test_the_argument_of_calibrate_overrides_the_modifiers_policy():
    model, bad = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.full((4, 8), float("nan"))
    calibrate(
        model, [torch.ones(4, 8), bad], QuantizationModifier(scheme="FP8", targets="Linear"), nonfinite="skip",
        progress=False
    )
    assert torch.isfinite(model[0].input_scale).all()


def test_a_nan_in_a_weight_never_becomes_a_scale():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
    with torch.no_grad(): model[0].weight[3, 7] = float("nan")
    with pytest.raises(NonFiniteError, match=r"0, weight: 1 non-finite value.*\(3, 7\)"):
        calibrate(model, None, QuantizationModifier(scheme="NVFP4A16", targets="Linear"), progress=False)
    reset_quantization(model)
    calibrate(
        model, None, QuantizationModifier(scheme="NVFP4A16", targets="Linear", nonfinite="record"), progress=False
    )
    assert all(torch.isfinite(s.float()).all() for s in qparams(model).values())


def wide(dtype, big):
    "A model that is fed a range, and what quantizes its input."
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4)).to(dtype), torch.tensor([[big, -big, 0, 0]], dtype=dtype)
    inputs = dict(num_bits=8, strategy="tensor", symmetric=False, observer="static_minmax")
    return model, x, QuantizationModifier(config_groups={"g": dict(targets=["Linear"], input_activations=inputs)})


@pytest.mark.parametrize("big", [5e4, 6e4, 65504.0])
def test_a_range_wider_than_float16_has_the_scale_that_fits(big):
    model, x, modifier = wide(torch.float16, big)
    calibrate(model, [x], modifier, progress=False)
    assert model[0].input_scale.dtype == torch.float16
    assert model[0].input_scale.item() == torch.tensor(2 * x.float().max() / 255).half().item()
    assert model[0].input_zero_point.item() in (-1, 0)
    assert (fake_quantize(x, model[0].input_scale, model[0].input_zero_point, modifier.resolved_config.config_groups[
        "g"].input_activations) - x).abs().max() <= model[0].input_scale


def test_a_range_too_wide_for_its_dtype_is_an_error_and_no_scale():
    model, x, modifier = wide(torch.float32, 3e38)
    with pytest.raises(NonFiniteError, match="0, input: the range .* is too wide for a scale in torch"):
        calibrate(model, [x], modifier, progress=False)
    assert phase_of(model) == "calibrating" and model[0].input_scale.isnan().all()


def test_a_tensor_without_any_finite_value_contributes_nothing():
    nan, two = torch.full((2, 8), float("nan")), torch.full((2, 8), 2.0)
    def scale(data):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        calibrate(model, data, QuantizationModifier(scheme="INT8_STATIC", nonfinite="record"), progress=False)
        return model[0].input_scale
    assert torch.equal(scale([nan, two]), scale([two])) and torch.equal(scale([two, nan]), scale([two]))
    with pytest.raises(ValueError, match="0.input"): scale([nan])


def test_skip_takes_the_whole_batch_out():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    # the module runs twice in a batch; the second time on its own output
    twice = torch.nn.Sequential(model[0], torch.nn.Identity(), model[0])
    with torch.no_grad(): model[0].weight.fill_(1e30)
    modifier = QuantizationModifier(scheme="FP8", nonfinite="skip")
    calibrate(twice, [torch.full((1, 8), 1e-30), torch.full((1, 8), 1e10)], modifier, progress=False)
    kept = twice[0].input_scale.item()
    reset_quantization(twice)
    alone = torch.nn.Sequential(model[0], torch.nn.Identity(), model[0])
    calibrate(alone, [torch.full((1, 8), 1e-30)], QuantizationModifier(scheme="FP8"), progress=False)
    assert kept == alone[0].input_scale.item()


def test_a_weight_that_cannot_be_observed_stops_the_end_before_it_writes():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with torch.no_grad(): model[0].weight[0, 0] = float("nan")
    modifier = QuantizationModifier(scheme="FP8", nonfinite="skip", ignore=[])
    run_until(model, modifier, "started", [])
    model[1](torch.randn(2, 8))
    model[0].input_observer(torch.randn(2, 8))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"0\.weight\. Their weights hold non-finite values: repair them"):
        modifier.on_end(State(model))
    assert differences(before, fingerprint(model)) == []
