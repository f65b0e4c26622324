"""Percentile, entropy and histogram_mse: against sorting, a plain numpy rendering of the algorithm, and a search over the values themselves."""
import math
import warnings

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from helpers import differences, fingerprint, make_batches, make_model, outputs, qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcal_nb.histogram import Histogram
from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.observers import HistogramObserver, Observer
from qcal_nb.observers.base import NonFiniteError, current_batch
from qcal_nb.observers.histogram import divergences, level_cuts, quantization_error, without_zeros
from qcal_nb.observers.search import shrink_search
from qcal_nb.pipelines import calibrate
from qcal_nb.schemes import preset

NAMES = ["percentile", "entropy", "histogram_mse"]
INT8 = preset("INT8_STATIC").input_activations
ARGS = {"int8": INT8, "int8 asymmetric": INT8.model_copy(update={"symmetric": False}), "int4": INT8.model_copy(update={"num_bits": 4}),
        "int4 asymmetric": INT8.model_copy(update={"num_bits": 4, "symmetric": False}), "fp8": preset("FP8").input_activations}
TENSORS = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, -0.0, 1.0, 1e-40, -1e-40, 1e-3]))
STREAMS = st.lists(hnp.arrays(np.float32, st.tuples(st.just(1), st.integers(1, 12)), elements=TENSORS).map(torch.from_numpy), min_size=1, max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def observed(name, stream, args=INT8, base_name="input", **kwargs):
    observer = Observer.load_from_registry(name, base_name=base_name, args=args, **kwargs)
    for tensor in stream: observer(tensor)
    return observer


def ends(observer): return tuple(end.item() for end in observer.clip_range())


def heavy(n=20_000, seed=0, dtype=torch.float32):
    "Values with tails: a product of two normal ones."
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, n, generator=generator) * torch.randn(1, n, generator=generator)).to(dtype)


# --- a function of the multiset of values ---

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
    for key, op in a.sync_ops.items(): setattr(a, key, ops[str(op).rsplit(".", 1)[-1]](getattr(a, key), getattr(b, key)))
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


@given(st.sampled_from(NAMES), st.sampled_from(list(ARGS)), STREAMS, DTYPES)
@settings(max_examples=80)
def test_the_range_stays_within_what_was_seen_and_the_scale_is_sane(name, args, stream, dtype):
    observer = observed(name, [t.to(dtype) for t in stream], ARGS[args])
    (low, high), everything = observer.clip_range(), torch.cat(stream, dim=1).to(dtype)
    assert everything.min() <= low <= high <= everything.max() and low.dtype == high.dtype == dtype and low.shape == (1,)
    q = observer.get_qparams()
    assert q["scale"].isfinite().all() and (q["scale"] > 0).all() and q["scale"].dtype == dtype and q["global_scale"] is None


@pytest.mark.parametrize("args", ARGS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [
    torch.full((1, 64), 3.0), torch.full((1, 64), -0.1), torch.zeros(1, 9), torch.tensor([[7.3]]), torch.tensor([[1e-42]]),
], ids=["constant", "negative constant", "zeros", "one value", "one subnormal"])
def test_odd_tensors_conclude_what_minmax_does(name, args, value):
    "With a single value there is nothing to clip."
    got, want = observed(name, [value], ARGS[args]).get_qparams(), observed("static_minmax", [value], ARGS[args]).get_qparams()
    if name == "histogram_mse": assert (got["scale"] <= want["scale"]).all() and (got["scale"] >= 0.79 * want["scale"]).all()
    else: assert torch.equal(got["scale"], want["scale"]) and torch.equal(got["zero_point"], want["zero_point"])


@pytest.mark.parametrize("name", NAMES)
def test_positive_tensors_use_the_whole_asymmetric_range(name):
    q = observed(name, [heavy().relu()], ARGS["int8 asymmetric"]).get_qparams()
    assert q["zero_point"].item() == -128 and 0 < q["scale"].item() <= heavy().max().item() / 255


# --- percentile ---

@given(hnp.arrays(np.float32, st.integers(1, 300), elements=TENSORS).map(torch.from_numpy), st.floats(50.1, 100), st.booleans())
def test_percentile_is_the_exact_quantile_within_the_bound(x, percentile, symmetric):
    args = INT8.model_copy(update={"symmetric": symmetric})
    for data in (x, x.bfloat16()):
        low, high = ends(observed("percentile", [data[None]], args, percentile=percentile))
        wide, slack = data.double().numpy(), 2.0**-7 if data.dtype == torch.bfloat16 else 2.0**-8  # the range is rounded to bfloat16
        if symmetric:
            size = np.quantile(abs(wide), percentile / 100, method="linear")
            want, between = (max(-size, wide.min()), min(size, wide.max())), neighbours(abs(wide), percentile / 100)
        else:
            want = np.quantile(wide, 1 - percentile / 100), np.quantile(wide, percentile / 100)
            between = max(neighbours(wide, percentile / 100), neighbours(wide, 1 - percentile / 100))
        assert abs(low - want[0]) <= slack * between + 1e-12 and abs(high - want[1]) <= slack * between + 1e-12


def neighbours(values, q):
    "The larger magnitude of the two values between which a quantile lies."
    s, rank = np.sort(values), q * (len(values) - 1)
    return max(abs(s[math.floor(rank)]), abs(s[math.ceil(rank)]))


def test_percentile_100_is_minmax_to_the_bit():
    data = heavy()
    for args in ARGS.values():
        got, want = observed("percentile", [data], args, percentile=100), observed("static_minmax", [data], args)
        assert torch.equal(got.get_qparams()["scale"], want.get_qparams()["scale"])


def test_percentile_clips_the_share_that_was_asked_for():
    data = heavy(200_000)
    for percentile in (99.99, 99.0, 90.0):
        low, high = ends(observed("percentile", [data], percentile=percentile))
        clipped = ((data < low) | (data > high)).double().mean().item()
        assert clipped == pytest.approx(1 - percentile / 100, rel=0.1)
        a, b = ends(observed("percentile", [data], ARGS["int8 asymmetric"], percentile=percentile))
        assert (data < a).double().mean().item() == pytest.approx(1 - percentile / 100, rel=0.15)
        assert (data > b).double().mean().item() == pytest.approx(1 - percentile / 100, rel=0.15)


# --- entropy ---

def brute_force(bins, first, last, levels, beyond=(0.0, 0.0)):
    """D(P||Q) of one range, bin by bin, as Migacz' slides put it: clip into the outermost bins, merge into levels,
    spread over the bins that were not empty. Bins that values are clipped into count as one value of all at least.
    `levels`: from the middle of each bin (share of the range) to its level."""
    window = bins[first:last]
    if window.sum() == 0: return np.inf
    left, right = bins[:first].sum() + beyond[0], bins[last:].sum() + beyond[1]
    p = window.copy()
    p[0] += left
    p[-1] += right
    level = levels((np.arange(last - first) + 0.5) / (last - first))
    q = np.zeros(last - first)
    for number in np.unique(level):
        members = (level == number) & (window > 0)
        if members.any(): q[members] = window[members].sum() / members.sum()
    if left > 0: q[0] = max(q[0], window.sum() / p.sum())
    if right > 0: q[-1] = max(q[-1], window.sum() / p.sum())
    p, q = p / p.sum(), q / q.sum()
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def brute_force_search(bins, zero, count, levels):
    "The widest range with the least divergence: first the end farther from zero (in bins), then the other."
    first, last = 0, len(bins)
    for side in ("right", "left") if len(bins) - zero >= zero else ("left", "right"):
        if side == "right": windows = [(first, i) for i in range(max(first + count, math.floor(zero)), len(bins) + 1)]
        else: windows = [(i, last) for i in range(min(last - count, math.floor(zero)), -1, -1)]
        lost = [brute_force(bins, *w, levels) for w in windows]
        first, last = max((w for w, d in zip(windows, lost) if d <= min(lost) + 1e-12), key=lambda w: w[1] - w[0])
    return first, last


def equal_levels(number): return lambda shares: np.minimum((shares * number + 1e-12).astype(int), number - 1)


def nearest_code(codes): return lambda shares: np.array([np.flatnonzero((d := abs(codes - s)) <= d.min() + 1e-12)[-1] for s in shares])


def fp8_magnitudes():
    "By the definition of E4M3: 4 bits of exponent with bias 7, 3 of mantissa, subnormals, and one pattern for NaN."
    values = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0**(e - 7) for e in range(1, 16) for m in range(8)]
    return np.array(values[:-1]) / 448


KINDS = {"int4": (ARGS["int4"], 8, equal_levels(8)), "int4 asymmetric": (ARGS["int4 asymmetric"], 16, equal_levels(16)),
         "int8": (INT8, 128, equal_levels(128)), "fp8": (ARGS["fp8"], 127, nearest_code(fp8_magnitudes()))}


@pytest.mark.parametrize("beyond", [(0.0, 0.0), (0.0, 3.0), (5.5, 1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences_are_those_of_the_plain_algorithm(kind, beyond):
    args, count, levels = KINDS[kind]
    n = 60 if "int4" in kind else 150
    zero = 0 if args.symmetric else int(0.37 * n)
    if args.symmetric: beyond = (0.0, beyond[1])
    for seed in range(4):
        rng = np.random.default_rng(seed)
        bins = rng.poisson(20 * np.exp(-abs(np.arange(n) - zero) / (4 + 6 * seed))).astype(float) * (1.0 if seed % 2 else 0.7)
        bins[-1] += 1
        if seed == 3: bins[:n // 2] = 0  # the narrowest candidates are empty
        windows = [(a, b) for a in range(0, zero + 1, 3) for b in range(max(a + count, zero), n + 1)]
        got = divergences(bins, *np.array(windows).T, level_cuts(args), beyond)
        want = np.array([brute_force(bins, a, b, levels, beyond) for a, b in windows])
        assert np.isfinite(want).any() and (np.isinf(got) == np.isinf(want)).all()
        fine = np.isfinite(want)
        assert np.allclose(got[fine], want[fine], rtol=1e-9, atol=1e-12), np.array(windows)[fine][abs(got - want)[fine].argmax()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])
def test_entropy_chooses_what_the_plain_algorithm_does(kind, dtype, shift):
    "From the values: an ordinary histogram of them without the zeros, and every candidate bin by bin."
    args, count, levels = KINDS[kind]
    n = 40 if "int4" in kind else 200
    data = (torch.randn(1, 5000, generator=torch.Generator().manual_seed(3)) + shift).to(dtype)
    data[0, :500] = 0
    values = data[data != 0].double().numpy()
    low, high = (0.0, abs(values).max()) if args.symmetric else (min(values.min(), 0), max(values.max(), 0))
    observer = observed("entropy", [data], args, num_bins=n)
    counted = without_zeros(observer.histogram())
    bins = (counted.abs() if args.symmetric else counted).linear(n, low, high)[0]
    plain = np.histogram(abs(values) if args.symmetric else values, n, (low, high))[0]
    assert abs(bins.cumsum() - plain.cumsum()).max() <= 0.01 * plain.sum()  # the same, but for values near the edge of a bin
    assert (bins > 0).sum() >= count  # so that nothing is given up beforehand
    first, last = brute_force_search(bins, -low / (high - low) * n, count, levels)
    width = (high - low) / n
    a, b = (-last * width, last * width) if args.symmetric else (low + first * width, low + last * width)
    got = ends(observer)
    assert got[0] == pytest.approx(max(a, values.min()), rel=2**-7) and got[1] == pytest.approx(min(b, values.max()), rel=2**-7)


@pytest.mark.parametrize("args, levels", [("int8", 128), ("int8 asymmetric", 256), ("int4", 8), ("int4 asymmetric", 16), ("fp8", 127)])
def test_levels(args, levels):
    cuts = level_cuts(ARGS[args])
    assert len(cuts) == levels + 1 and cuts[0] == 0 and cuts[-1] == 1 and (np.diff(cuts) > 0).all()


@pytest.mark.parametrize("args", ["int8", "int8 asymmetric", "int4", "int4 asymmetric"])
@pytest.mark.parametrize("size", [20.0, 1e3, 1e6, 1e12])
def test_entropy_clips_a_freak_value_however_large(size, args):
    body = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    freak = torch.cat([body, torch.tensor([[size]])], dim=1)
    low, high = ends(observed("entropy", [freak], ARGS[args]))
    assert 2 < high < 10 and -10 < low < (0 if "asymmetric" in args else -2) and observed("static_minmax", [freak]).max_vals == size


def test_buckets_lose_little_of_what_an_ordinary_histogram_knows():
    "The range chosen costs at most a tenth more divergence than the best, both measured on bins of the values themselves."
    for args, least in (("int8", 128), ("int4", 8)):
        for seed in range(3):
            values = heavy(200_000, seed)
            top, last = values.abs().max().item(), np.arange(least, 2049)
            true = divergences(np.histogram(values.abs().numpy(), 2048, (0, top))[0].astype(float), 0 * last, last, level_cuts(ARGS[args]))
            chosen = max(map(abs, ends(observed("entropy", [values], ARGS[args]))))
            assert true[round(chosen / top * 2048) - least] <= 1.1 * true.min()


def test_a_few_different_values_are_all_kept():
    values = torch.tensor([[1.0, -2.0, 3.0, 250.0]])
    for args in ARGS: assert ends(observed("entropy", [values.repeat(1, 50)], ARGS[args])) == (-2.0, 250.0)


def test_entropy_keeps_a_body_of_equals():
    uniform = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0))
    for args in ARGS: assert ends(observed("entropy", [uniform], ARGS[args]))[1] > 0.95, args


def test_zeros_do_not_change_the_entropy_range():
    data = heavy().relu()
    padded = torch.cat([data, torch.zeros(1, 10**5)], dim=1)
    assert ends(observed("entropy", [padded])) == ends(observed("entropy", [data]))


# --- histogram_mse ---

def search_over_values(data, args, maxshrink=0.20, patience=5, grid=100.0, norm=2.4, expand=1.0):
    "The shrink search on the tensor itself, each value quantized in its own dtype, errors summed in float64."
    low, high = data.min().reshape(1) * expand, data.max().reshape(1) * expand
    least, found, failures, errors = math.inf, (low, high), 0, []
    for i in range(int(maxshrink * grid)):
        p = 1 - i / grid
        scale, zero_point = calculate_qparams(low * p, high * p, args)
        quantized = fake_quantize(data, scale, zero_point, args).double()
        errors.append((quantized - data.double()).abs().pow(norm).sum().item())
        if errors[-1] < least: least, found, failures = errors[-1], (low * p, high * p), 0
        else:
            failures += 1
            if failures >= patience: break
    return tuple(end.item() for end in found), least, errors


@pytest.mark.parametrize("args", ARGS)
@pytest.mark.parametrize("options", [
    {}, dict(maxshrink=0.9, patience=90), dict(norm=1.0, grid=37.0), dict(patience=0), dict(expand=1.5, maxshrink=0.6), dict(maxshrink=0),
], ids=str)
def test_the_winner_is_that_of_a_search_over_the_values_for_bfloat16(args, options):
    for seed in range(3):
        data = heavy(5000, seed, torch.bfloat16) * (1 + seed)
        assert ends(observed("histogram_mse", [data], ARGS[args], **options)) == search_over_values(data, ARGS[args], **options)[0]


@given(hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-100, 100, width=32)).map(torch.from_numpy), st.sampled_from(list(ARGS)))
@settings(max_examples=50)
def test_the_error_of_the_winner_is_the_least_for_bfloat16(x, args):
    "Here the winner need not be the same: sums of errors that are equal but for their order of summation."
    data = x.bfloat16()[None]
    found, least, _ = search_over_values(data, ARGS[args], patience=100)
    low, high = observed("histogram_mse", [data], ARGS[args], patience=100).clip_range()
    scale, zero_point = calculate_qparams(low, high, ARGS[args])
    error = (fake_quantize(data, scale, zero_point, ARGS[args]).double() - data.double()).abs().pow(2.4).sum().item()
    assert error <= least * (1 + 1e-9)


@pytest.mark.parametrize("args", ARGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_error_of_the_winner_is_within_two_percent_of_the_least(args, dtype):
    "Errors are known to one percent each, so that the winner's is above the least by two at most."
    for seed in range(3):
        data = heavy(50_000, seed, dtype)
        low, high = observed("histogram_mse", [data], ARGS[args], patience=100).clip_range()
        scale, zero_point = calculate_qparams(low, high, ARGS[args])
        error = (fake_quantize(data, scale, zero_point, ARGS[args]).double() - data.double()).abs().pow(2.4).sum().item()
        assert error <= 1.02 * search_over_values(data, ARGS[args], patience=100)[1]


@pytest.mark.parametrize("patience, tried", [(0, 2), (1, 2), (3, 4), (99, 20)])
def test_the_search_gives_up_after_patience_failures_in_a_row(patience, tried):
    calls, ends, shrinks = [], [torch.tensor([v]) for v in (-1.0, 1.0)], [1 - i / 100 for i in range(20)]
    def error(low, high): return calls.append((low.item(), high.item())) or torch.ones(1)
    found = shrink_search(*ends, shrinks, patience, error)
    assert len(calls) == tried and found == tuple(ends)  # the first of equals
    def improving(low, high): return calls.append(1) or torch.tensor([-len(calls) // 2]).float()  # every other candidate is better
    calls.clear()
    shrink_search(*ends, shrinks, 2, improving)
    assert len(calls) == 20


def test_no_value_is_taken_to_lie_beyond_the_extremes():
    "A constant is known exactly, whatever its bucket: the bucket is cut at the extremes."
    data = torch.full((1, 7), 3.3)
    ends = data.min().reshape(1), data.max().reshape(1)
    scale, zero_point = calculate_qparams(*ends, INT8)
    exact = (fake_quantize(data, scale, zero_point, INT8).double() - data.double()).square().sum().item()
    assert quantization_error(Histogram.of(data), INT8, *ends, ends) == pytest.approx(exact, rel=1e-12)


def test_float32_that_holds_bfloat16_values_is_searched_exactly():
    data = heavy(5000, 1, torch.bfloat16).float()
    observer = observed("histogram_mse", [data])
    assert observer.histogram().exact and ends(observer) == search_over_values(data, INT8)[0]
    observer(torch.tensor([[0.1]]))
    assert not observer.histogram().exact


def test_only_expand_goes_beyond_what_was_seen():
    data = torch.cat([torch.full((1, 50), 1.0), torch.full((1, 50), 0.9)], dim=1)
    beyond = max(ends(observed("histogram_mse", [data], ARGS["int4"], expand=e, maxshrink=0.5, patience=99))[1] for e in (1.2, 1.5, 1.8))
    assert beyond > 1.0 >= ends(observed("histogram_mse", [data], ARGS["int4"], maxshrink=0.5, patience=99))[1]


# --- what they refuse ---

BAD_KWARGS = [
    ("percentile", dict(percentile=50), "percentile=50 must be a number in (50, 100]"),
    ("percentile", dict(percentile=100.1), "percentile=100.1"),
    ("percentile", dict(percentile=0.9999), "percentile=0.9999 must be a number in (50, 100]"),
    ("percentile", dict(percentile="99"), "percentile='99'"),
    ("percentile", dict(percentile=True), "percentile=True"), ("percentile", dict(percentile=math.nan), "percentile=nan"),
    ("percentile", dict(percentil=99), "percentil=99 is unknown to PercentileObserver; valid arguments: percentile"),
    ("entropy", dict(num_bins=128), "num_bins=128 must be an int of at least 129, more than the 128 levels of int8 symmetric"),
    ("entropy", dict(num_bins=2048.0), "num_bins=2048.0 must be an int"), ("entropy", dict(num_bins=True), "num_bins=True"),
    ("entropy", dict(num_bins=None), "num_bins=None"),
    ("entropy", dict(bins=2048), "bins=2048 is unknown to EntropyObserver; valid arguments: num_bins"),
    ("histogram_mse", dict(grid=0), "grid=0 must be a finite number greater than 0"), ("histogram_mse", dict(grid=-1.0), "grid=-1.0"),
    ("histogram_mse", dict(norm=0), "norm=0 must be a finite number greater than 0"), ("histogram_mse", dict(norm=math.inf), "norm=inf"),
    ("histogram_mse", dict(norm=math.nan), "norm=nan"), ("histogram_mse", dict(maxshrink=1.1), "maxshrink=1.1 must be a finite number in [0, 1]"),
    ("histogram_mse", dict(maxshrink=-0.1), "maxshrink=-0.1"), ("histogram_mse", dict(expand=0.9), "expand=0.9 must be a finite number at least 1"),
    ("histogram_mse", dict(patience=-1), "patience=-1 must be a finite number at least 0"), ("histogram_mse", dict(patience="5"), "patience='5'"),
    ("histogram_mse", dict(averaging_constant=0.1), "valid arguments: maxshrink, patience, grid, norm, expand"),
]


@pytest.mark.parametrize("name, kwargs, words", BAD_KWARGS, ids=[f"{n} {k}" for n, k, _ in BAD_KWARGS])
def test_bad_arguments_are_refused_when_the_observer_is_made(name, kwargs, words):
    for make in (lambda: Observer.load_from_registry(name, base_name="input", args=INT8, **kwargs),
                 lambda: Observer.load_from_registry(name, base_name="input", args=INT8.model_copy(update={"observer_kwargs": kwargs}))):
        with pytest.raises(ValueError) as error: make()
        assert words in str(error.value)


def test_good_arguments_at_the_ends_of_their_ranges():
    for name, kwargs in (("percentile", dict(percentile=50.001)), ("percentile", dict(percentile=100)), ("entropy", dict(num_bins=129)),
                         ("histogram_mse", dict(maxshrink=1, patience=0, grid=0.5, norm=0.1)), ("histogram_mse", dict(maxshrink=0, expand=1))):
        assert observed(name, [heavy(100)], triton_error_buffer=0.3, **kwargs).get_qparams()["scale"].isfinite().all()


def test_bins_must_outnumber_the_levels_of_the_format():
    for args, least in (("int4", 9), ("int8 asymmetric", 257), ("fp8", 128)):
        observed("entropy", [], ARGS[args], num_bins=least)
        with pytest.raises(ValueError, match=f"at least {least}"): observed("entropy", [], ARGS[args], num_bins=least - 1)


OTHER = dict(channel={}, group=dict(group_size=8), token=dict(dynamic=True), tensor_group=dict(group_size=16, num_bits=4, type="float"),
             block=dict(block_structure=[8, 8]), attn_head={})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", OTHER)
def test_only_per_tensor(name, strategy):
    args = QuantizationArgs(**(dict(num_bits=8, strategy=strategy) | OTHER[strategy]))
    with pytest.raises(ValueError, match=f"strategy='{strategy}'.* one histogram per tensor; use strategy 'tensor'"):
        Observer.load_from_registry(name, base_name="input", args=args)


# --- values that are not numbers ---

DIRTY = torch.tensor([[1.0, math.nan, -2.0, math.inf, 0.5]])
CLEAN = torch.tensor([[1.0, -2.0, 0.5]])


@pytest.mark.parametrize("name", NAMES)
def test_nonfinite_values_raise_and_leave_the_statistics(name):
    observer = observed(name, [CLEAN])
    before = observer.get_statistics()
    with pytest.raises(NonFiniteError, match=r"2 non-finite values, the first \(nan\) at position \(0, 1\)"): observer(DIRTY)
    assert all(v is before[k] for k, v in observer.get_statistics().items())


@pytest.mark.parametrize("name", NAMES)
def test_nonfinite_elements_alone_leave_under_record(name):
    observer = Observer.load_from_registry(name, base_name="input", args=INT8)
    observer.nonfinite = "record"
    observer(DIRTY)(torch.full((1, 3), -math.inf))
    assert observer.histogram() == Histogram.of(CLEAN) and observer.counts.nonfinite == 5
    assert torch.equal(observer.get_qparams()["scale"], observed(name, [CLEAN]).get_qparams()["scale"])


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_nonfinite_values_leaves_under_skip(name):
    observer = Observer.load_from_registry(name, base_name="input", args=INT8)
    observer.nonfinite = "skip"
    for index, batch in enumerate([CLEAN, DIRTY, 2 * CLEAN]):
        token = current_batch.set(index)
        try: observer(batch)
        finally: current_batch.reset(token)
    assert observer.histogram() == Histogram.of(torch.cat([CLEAN, 2 * CLEAN])) and observer.counts.skipped == 1


# --- in a model ---

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
        calibrate(model, batches, QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"], input_observer=name), progress=False)
        return qparams(model)
    first, second = scales(data), scales(data[::-1])
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_outputs_per_tensor(name):
    part = dict(num_bits=8, strategy="tensor", observer=name)
    model = make_model("llama_gqa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calibrate(model, make_batches(), QuantizationModifier(config_groups={"g": QuantizationScheme(
            targets=["re:.*proj$"], weights=dict(part), input_activations=dict(part), output_activations=dict(part))}), progress=False)
    found = qparams(model)
    assert len(found) == 14 * 6 and all(v.float().isfinite().all() for v in found.values())


def test_a_strategy_that_cannot_be_served_leaves_the_model_as_it_was():
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="strategy='channel': PercentileObserver keeps one histogram per tensor"):
        calibrate(model, make_batches(), QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"], weight_observer="percentile"), progress=False)
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == []


def test_the_base_class_is_not_registered():
    assert "histogram" not in Observer.registered_names() and set(NAMES) <= set(Observer.registered_names())
    with pytest.raises(TypeError, match="abstract"): HistogramObserver("input", INT8)
