"""A model that is calibrated already gives its row and is not touched."""
import pytest
from helpers import differences, fingerprint

from qcal_nb.lifecycle import borrowed
from qcal_nb.evaluate import compare_schemes, evaluate
from qcal_nb.lifecycle import LifecycleError, reset_quantization
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.evaluate.schemes import SCHEME_COLUMNS
from tests.evaluate.samples import CALLS, QUIET, W4A4, Counting


def test_a_calibrated_model_is_not_touched(llama, data):
    calibrate(llama, data, QuantizationModifier(scheme="FP8", ignore=["lm_head"]), **QUIET)
    before = fingerprint(llama)
    for call in CALLS.values():
        with pytest.raises(LifecycleError, match="needs the unquantized model, but this one is calibrated"):
            call(llama, data, data)
    assert differences(before, fingerprint(llama)) == []
    with pytest.raises(LifecycleError), borrowed(llama, "a test"): pass


FIGURES = [c for c in SCHEME_COLUMNS if c not in ("scheme", "why")]


def test_a_calibrated_model_gives_its_row_and_stays_as_it_is(llama, data, evals):
    for scheme in (W4A4, "FP8"):
        row = compare_schemes(llama, data, {"one": scheme}, eval_data=evals, **QUIET).iloc[1]
        calibrate(llama, data, QuantizationModifier(scheme=scheme, ignore=["lm_head"]), **QUIET)
        llama.train()
        before = fingerprint(llama)
        found = evaluate(llama, evals, **QUIET)
        assert list(found.index) == FIGURES and all(found[c] == row[c] for c in FIGURES) and found.kl > 0
        assert differences(before, fingerprint(llama)) == [] and llama.training
        llama.eval()
        reset_quantization(llama)


def test_of_a_calibrated_model_what_is_off_stays_off_and_an_error_leaves_it_as_it_is(llama, data, evals):
    calibrate(llama, data, QuantizationModifier(scheme=W4A4, ignore=["lm_head"]), **QUIET)
    whole, off = evaluate(llama, evals, **QUIET), llama.model.layers[0].mlp.down_proj
    off.quantization_enabled = False
    before, part = fingerprint(llama), evaluate(llama, evals, **QUIET)
    assert part.loss_before == whole.loss_before and 0 < part.kl != whole.kl
    counting = Counting(llama, stop_at=4, error=RuntimeError)
    with pytest.raises(RuntimeError, match="stopped by a test"): evaluate(llama, evals, **QUIET)
    counting.handle.remove()
    assert differences(before, fingerprint(llama)) == [] and off.quantization_enabled is False


def test_only_a_calibrated_model_is_evaluated(llama, data, evals):
    modifier = QuantizationModifier(scheme="FP8", ignore=["lm_head"])
    for phase, step in dict(
        original=lambda _: None, initialized=modifier.initialize_quantization, calibrating=modifier.start_calibration
    ).items():
        step(llama)
        with pytest.raises(LifecycleError, match=f"needs a calibrated model, but this one is {phase}"):
            evaluate(llama, evals, **QUIET)
