"""Percentile against sorting."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.observers.histograms import ARGS, INT8, TENSORS, ends, heavy, observed


@given(
    hnp.arrays(np.float32, st.integers(1, 300), elements=TENSORS).map(torch.from_numpy),
    st.floats(50.1, 100),
    st.booleans(),
)
def test_percentile_is_the_exact_quantile_within_the_bound(x, percentile, symmetric):
    args = INT8.model_copy(update={"symmetric": symmetric})
    for data in (x, x.bfloat16()):
        low, high = ends(observed("percentile", [data[None]], args, percentile=percentile))
        # the range is rounded to bfloat16
        wide, slack = data.double().numpy(), 2.0**-7 if data.dtype == torch.bfloat16 else 2.0**-8
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
