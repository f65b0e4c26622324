"""histogram_mse against a search over the values themselves."""
import math

import numpy as np
import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcal_nb.stats import Histogram
from qcal_nb.observers.histogram import quantization_error
from qcal_nb.observers.search.definition import shrink_search
from tests.observers.histograms import ARGS, INT8, ends, heavy, observed


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
    {}, dict(maxshrink=0.9, patience=90), dict(norm=1.0, grid=37.0), dict(patience=0), dict(expand=1.5, maxshrink=0.6),
    dict(maxshrink=0),
], ids=str)
def test_the_winner_is_that_of_a_search_over_the_values_for_bfloat16(args, options):
    for seed in range(3):
        data = heavy(5000, seed, torch.bfloat16) * (1 + seed)
        assert ends(observed("histogram_mse", [data], ARGS[args], **options)) == search_over_values(
            data, ARGS[args], **options
        )[0]


@given(
    hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-100, 100, width=32)).map(torch.from_numpy),
    st.sampled_from(list(ARGS)),
)
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
        error = (
            fake_quantize(data, scale, zero_point, ARGS[args]).double() - data.double()
        ).abs().pow(2.4).sum().item()
        assert error <= 1.02 * search_over_values(data, ARGS[args], patience=100)[1]


@pytest.mark.parametrize("patience, tried", [(0, 2), (1, 2), (3, 4), (99, 20)])
def test_the_search_gives_up_after_patience_failures_in_a_row(patience, tried):
    calls, ends, shrinks = [], [torch.tensor([v]) for v in (-1.0, 1.0)], [1 - i / 100 for i in range(20)]
    def error(low, high): return calls.append((low.item(), high.item())) or torch.ones(1)
    found = shrink_search(*ends, shrinks, patience, error)
    assert len(calls) == tried and found == tuple(ends)  # the first of equals
    # every other candidate is better
    def improving(low, high): return calls.append(1) or torch.tensor([-len(calls) // 2]).float()
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
    beyond = max(
        ends(observed("histogram_mse", [data], ARGS["int4"], expand=e, maxshrink=0.5, patience=99))[1]
        for e in (1.2, 1.5, 1.8)
    )
    assert beyond > 1.0 >= ends(observed("histogram_mse", [data], ARGS["int4"], maxshrink=0.5, patience=99))[1]
