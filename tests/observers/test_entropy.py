"""Entropy against a plain numpy rendering of the algorithm."""
import math

import numpy as np
import pytest
import torch

from qcal_nb.observers.histogram import divergences, level_cuts, without_zeros
from tests.observers.histograms import ARGS, INT8, ends, heavy, observed


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


def nearest_code(codes):
    return lambda shares: np.array([np.flatnonzero((d := abs(codes - s)) <= d.min() + 1e-12)[-1] for s in shares])


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
        bins = rng.poisson(
            20 * np.exp(-abs(np.arange(n) - zero) / (4 + 6 * seed))
        ).astype(float) * (1.0 if seed % 2 else 0.7)
        bins[-1] += 1
        if seed == 3: bins[:n // 2] = 0  # the narrowest candidates are empty
        windows = [(a, b) for a in range(0, zero + 1, 3) for b in range(max(a + count, zero), n + 1)]
        got = divergences(bins, *np.array(windows).T, level_cuts(args), beyond)
        want = np.array([brute_force(bins, a, b, levels, beyond) for a, b in windows])
        assert np.isfinite(want).any() and (np.isinf(got) == np.isinf(want)).all()
        fine = np.isfinite(want)
        assert np.allclose(
            got[fine], want[fine], rtol=1e-9, atol=1e-12
        ), np.array(windows)[fine][abs(got - want)[fine].argmax()]


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
    # the same, but for values near the edge of a bin
    assert abs(bins.cumsum() - plain.cumsum()).max() <= 0.01 * plain.sum()
    assert (bins > 0).sum() >= count  # so that nothing is given up beforehand
    first, last = brute_force_search(bins, -low / (high - low) * n, count, levels)
    width = (high - low) / n
    a, b = (-last * width, last * width) if args.symmetric else (low + first * width, low + last * width)
    got = ends(observer)
    assert got[0] == pytest.approx(max(a, values.min()), rel=2**-7)
    assert got[1] == pytest.approx(min(b, values.max()), rel=2**-7)


@pytest.mark.parametrize(
    "args, levels", [("int8", 128), ("int8 asymmetric", 256), ("int4", 8), ("int4 asymmetric", 16), ("fp8", 127)]
)
def test_levels(args, levels):
    cuts = level_cuts(ARGS[args])
    assert len(cuts) == levels + 1 and cuts[0] == 0 and cuts[-1] == 1 and (np.diff(cuts) > 0).all()


@pytest.mark.parametrize("args", ["int8", "int8 asymmetric", "int4", "int4 asymmetric"])
@pytest.mark.parametrize("size", [20.0, 1e3, 1e6, 1e12])
def test_entropy_clips_a_freak_value_however_large(size, args):
    body = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    freak = torch.cat([body, torch.tensor([[size]])], dim=1)
    low, high = ends(observed("entropy", [freak], ARGS[args]))
    assert 2 < high < 10 and -10 < low < (0 if "asymmetric" in args else -2)
    assert observed("static_minmax", [freak]).max_vals == size


def test_buckets_lose_little_of_what_an_ordinary_histogram_knows():
    """The range chosen costs at most a tenth more divergence than the best, both measured on bins of the values
    themselves."""
    for args, least in (("int8", 128), ("int4", 8)):
        for seed in range(3):
            values = heavy(200_000, seed)
            top, last = values.abs().max().item(), np.arange(least, 2049)
            true = divergences(
                np.histogram(values.abs().numpy(), 2048, (0, top))[0].astype(float), 0 * last, last,
                level_cuts(ARGS[args])
            )
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
