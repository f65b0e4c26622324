"""Findings: each sentence against a record that was made so that it must, or must not, be said."""
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import given
from hypothesis import strategies as st

from qcal_nb.analysis import compare_observers, ranges
from qcal_nb.analysis.summary import OUTLIER_THRESHOLD
from qcal_nb.analysis import Finding, findings
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import calibration_texts, inject_outliers, load_tiny_llama
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.stats import TensorStats, measure
from helpers import make_batches, make_model


def said(run, words, **options): return next((f for f in findings(run, **options) if words in f.words), None)


@pytest.fixture(scope="module")
def tiny(): return load_tiny_llama()


def test_what_is_wrong_comes_first_and_by_name():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    bad = x.clone()
    bad[3, 1] = torch.nan
    run = CalibrationRecord(
        {("fine", "input"): measure(x, 0), ("bad", "input"): measure(bad, 0), ("never", "input"): TensorStats()},
        spans=((0, 1),),
        level_tokens={0: 8},
        expert_tokens={"experts.0": 3, "experts.1": 0},
    )
    found = findings(run)
    assert [f.warning for f in found] == sorted((f.warning for f in found), reverse=True)
    assert said(run, "not finite in 1 tensor.").tensors == (
        "bad (input): 1 NaN, 0 infinite, the first nan at (3, 1) of batch 0",
    )
    assert said(run, "Never seen: 1 tensor.").tensors == ("never (input)",)
    assert said(run, "Not chosen by any token: 1 expert.").tensors == ("experts.1",)


def test_a_clean_record_has_no_warnings():
    run = record(make_model("llama_gqa"), make_batches(4), progress=False)
    assert not [f for f in findings(run) if f.warning] and said(run, "Was it enough data (4 batches, 128 tokens)?")
    assert said(run, "Left out") is None and said(run, "pieces of the calibration text") is None


@pytest.mark.parametrize("factor", [1.0, 30.0])
def test_outliers_are_counted_as_the_table_counts_them(factor):
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    x[17, 3] = factor * x.abs().max()
    run = CalibrationRecord({("a", "input"): measure(x, 0)}, spans=((0, 1),), level_tokens={0: 4000})
    found, many = said(run, "Outliers:"), int((ranges(run).outlier_ratio > OUTLIER_THRESHOLD).sum())
    assert many == int(factor > 1) and found.words.startswith(f"Outliers: {many} of 1 inputs")
    assert len(found.tensors) == many
    loud = said(run, "Outlier channels")
    assert (loud is not None) == (factor > 1) and (loud is None or "channel 3" in loud.tensors[0])


def test_injected_channels_are_named(tiny):
    model, tokenizer = load_tiny_llama()
    channels = set(sum(inject_outliers(model).values(), []))
    run = record(model, calibration_texts()[:3], tokenizer=tokenizer, max_length=128, progress=False)
    found = said(run, "Outlier channels")
    assert any(f"channel {c} (" in found.words for c in channels)
    assert said(run, "pieces of the calibration text").warning


def test_a_token_that_makes_the_largest_values_and_its_mask(tiny):
    model, tokenizer = tiny
    options = dict(
        tokenizer=tokenizer,
        max_length=64,
        progress=False,
        scheme=QuantizationModifier(targets="re:.*down_proj", scheme="INT8_STATIC"),
    )
    run = record(model, calibration_texts()[:4], **options)
    found = said(run, "makes the largest value of")
    assert found.words.startswith("The token '<s>'") and all("down_proj" in t for t in found.tensors)
    without = record(model, calibration_texts()[:4], mask=[tokenizer.bos_token_id], **options)
    assert said(without, "The token '<s>'") is None and said(without, "Left out of all statistics: token id 0.")


def test_the_observers_finding_is_the_comparison(tiny):
    model, tokenizer = tiny
    run = record(model, calibration_texts()[:2], tokenizer=tokenizer, max_length=64, progress=False)
    four = QuantizationArgs(num_bits=4, symmetric=True, strategy="tensor")
    table = compare_observers(run, args=four).query("base_name == 'input'")
    counts = table[table.best].observer.value_counts()
    found = said(run, "at the 16 inputs of 28 modules (int4", args=four)
    assert all(f"{name} at {n}" in found.words for name, n in counts.items()) and "less than 20 dB" in found.words
    limited = compare_observers(run, args=four).at_limit.sum()
    assert f"for {limited} tensor" in said(run, "ended at the smallest range", args=four).words


@given(st.lists(st.text("ab", min_size=1, max_size=3), max_size=9), st.booleans())
def test_a_finding_names_three_and_counts_the_rest(tensors, warning):
    lines = str(Finding("So it is.", tuple(tensors), warning)).splitlines()
    assert lines[0].startswith("! ") == warning and len(lines) == 1 + min(3, len(tensors)) + (len(tensors) > 3)
    assert len(tensors) <= 3 or lines[-1].strip() == f"and {len(tensors) - 3} more"


def test_nothing_and_not_a_record():
    assert [f.words for f in findings(CalibrationRecord())] == ["Nothing was recorded."]
    with pytest.raises(TypeError, match="record must be a CalibrationRecord, got str"): findings("run.safetensors")
