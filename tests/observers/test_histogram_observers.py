"""Percentile, entropy and histogram_mse are functions of the multiset of values, by themselves and in a model."""
import warnings

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from helpers import differences, fingerprint, make_batches, make_model, outputs, qparams
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcal_nb.stats import Histogram
from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.pipelines import calibrate
from tests.observers.histograms import ARGS, NAMES, TENSORS, heavy, observed

STREAMS = st.lists(
    hnp.arrays(np.float32, st.tuples(st.just(1), st.integers(1, 12)), elements=TENSORS).map(torch.from_numpy),
    min_size=1,
    max_size=6,
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@given(st.sampled_from(NAMES), st.sampled_from(list(ARGS)), STREAMS, DTYPES, st.randoms())
@settings(max_examples=60)
def test_order_and_split_do_not_matter_to_the_bit(name, args, stream, dtype, random):
    stream = [t.to(dtype) for t in stream]
    whole = observed(name, [torch.cat(stream, dim=1)], ARGS[args])
    parts = observed(name, random.sample(stream, len(stream)), ARGS[args])
    for key, value in whole.get_statistics().items(): assert torch.equal(value, parts.get_statistics()[key]), key
    for key in ("scale", "zero_point"): assert torch.equal(whole.get_qparams()[key], parts.get_qparams()[key])
    assert parts.histogram() == Histogram.of(torch.cat(stream, dim=1))


@given(st.sampled_from(NAMES), STREAMS, STREAMS)
@settings(max_examples=40)
def test_merged_statistics_conclude_what_one_observer_would(name, mine, theirs):
    "What an all-reduce does to two ranks, with the operations that the class declares."
    ops = {"SUM": torch.add, "MIN": torch.minimum, "MAX": torch.maximum}
    a, b, both = observed(name, mine), observed(name, theirs), observed(name, mine + theirs)
    assert [op for _, op in a.sync_stats()] == list(a.sync_ops.values()) and set(a.sync_ops) == set(a.statistics)
    for key, op in a.sync_ops.items():
        setattr(a, key, ops[str(op).rsplit(".", 1)[-1]](getattr(a, key), getattr(b, key)))
    assert all(torch.equal(v, both.get_statistics()[k]) for k, v in a.get_statistics().items())
    assert torch.equal(a.get_qparams()["scale"], both.get_qparams()["scale"])


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_new_at_each_update_and_asking_changes_nothing(name):
    observer = observed(name, [heavy(100)])
    before = observer.get_statistics()
    kept = {k: v.clone() for k, v in before.items()}
    observer.get_qparams()
    assert all(a is b for a, b in zip(before.values(), observer.get_statistics().values()))
    observer(heavy(100, seed=1))
    assert all(torch.equal(v, kept[k]) for k, v in before.items())
    assert all(v.data_ptr() != before[k].data_ptr() for k, v in observer.get_statistics().items())
    assert observer.buckets.dtype == torch.int64 and observer.buckets.sum() == 200


@pytest.mark.parametrize("name", NAMES)
def test_consumed_statistics_start_anew_and_a_weight_counts_once(name):
    observer = observed(name, [heavy(50)])
    observer.mark_consumed()
    assert observer(torch.ones(1, 3)).histogram().count == 3
    weight = observed(name, [torch.ones(2, 3), torch.zeros(2, 3)], base_name="weight")
    assert weight.histogram() == Histogram.of(torch.zeros(6)) and weight.max_vals.item() == 0


@example("histogram_mse", "int4", [torch.tensor([[-1.0]])], torch.float32)
@given(st.sampled_from(NAMES), st.sampled_from(list(ARGS)), STREAMS, DTYPES)
@settings(max_examples=80)
def test_the_range_stays_within_what_was_seen_and_the_scale_is_sane(name, args, stream, dtype):
    observer = observed(name, [t.to(dtype) for t in stream], ARGS[args])
    (low, high), everything = observer.clip_range(), torch.cat(stream, dim=1).to(dtype)
    # A search narrows both ends towards zero, as the reference does: of values of one sign the inner end moves past the
    # innermost of them.
    least, most = everything.min().clamp(max=0), everything.max().clamp(min=0)
    assert least <= low <= high <= most and low.dtype == high.dtype == dtype and low.shape == (1,)
    q = observer.get_qparams()
    assert q["scale"].isfinite().all() and (q["scale"] > 0).all() and q["scale"].dtype == dtype
    assert q["global_scale"] is None


@pytest.mark.parametrize("args", ARGS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [
    torch.full((1, 64), 3.0), torch.full((1, 64), -0.1), torch.zeros(1, 9), torch.tensor([[7.3]]),
    torch.tensor([[1e-42]]),
], ids=["constant", "negative constant", "zeros", "one value", "one subnormal"])
def test_odd_tensors_conclude_what_minmax_does(name, args, value):
    "With a single value there is nothing to clip."
    got = observed(name, [value], ARGS[args]).get_qparams()
    want = observed("static_minmax", [value], ARGS[args]).get_qparams()
    if name == "histogram_mse":
        assert (got["scale"] <= want["scale"]).all() and (got["scale"] >= 0.79 * want["scale"]).all()
    else: assert torch.equal(got["scale"], want["scale"]) and torch.equal(got["zero_point"], want["zero_point"])


@pytest.mark.parametrize("name", NAMES)
def test_positive_tensors_use_the_whole_asymmetric_range(name):
    q = observed(name, [heavy().relu()], ARGS["int8 asymmetric"]).get_qparams()
    assert q["zero_point"].item() == -128 and 0 < q["scale"].item() <= heavy().max().item() / 255


@pytest.mark.parametrize("name", NAMES)
def test_calibrate_from_beginning_to_end_and_back(name):
    model, data = make_model("llama_gqa"), make_batches()
    before, plain = fingerprint(model), outputs(model, data[0])
    calibrate(model, data, QuantizationModifier(scheme="FP8", ignore=["lm_head"], input_observer=name), progress=False)
    scales = {k: v for k, v in qparams(model).items() if k.endswith("input_scale")}
    assert len(scales) == 14 and all(s.isfinite().all() and (s > 0).all() for s in scales.values())
    assert not torch.equal(outputs(model, data[0]), plain)
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == [] and torch.equal(outputs(model, data[0]), plain)


@pytest.mark.parametrize("name", NAMES)
def test_order_and_size_of_batches_do_not_matter_to_a_model(name):
    "Weights first, so that the activations are the same: rows of a batch do not see each other."
    data = make_batches(4, shape=(1, 16))
    def scales(batches):
        model = make_model("llama_gqa")
        calibrate(
            model,
            batches,
            QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"], input_observer=name),
            progress=False,
        )
        return qparams(model)
    first, second = scales(data), scales(data[::-1])
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_outputs_per_tensor(name):
    part = dict(num_bits=8, strategy="tensor", observer=name)
    model = make_model("llama_gqa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate(
            model,
            make_batches(),
            QuantizationModifier(config_groups={
                "g": QuantizationScheme(
                    targets=["re:.*proj$"], weights=dict(part), input_activations=dict(part),
                    output_activations=dict(part)
                )
            }),
            progress=False,
        )
    found = qparams(model)
    assert len(found) == 14 * 6 and all(v.float().isfinite().all() for v in found.values())


def test_a_strategy_that_cannot_be_served_leaves_the_model_as_it_was():
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="strategy='channel': PercentileObserver keeps one histogram per tensor"):
        calibrate(
            model,
            make_batches(),
            QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"], weight_observer="percentile"),
            progress=False,
        )
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == []
