"""One read of a tensor says the same as one question after the other."""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcal_nb.stats import N_EXTREMES, measure
from qcal_nb.stats.reading import _read_each, _read_once, largest_places, read

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, 0.1])  # ties, zeros of both signs, the ends of float32
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rows(elements): return hnp.arrays(np.float32, SHAPES, elements=elements).map(torch.from_numpy)


def same_sums(a: Fraction, b: Fraction, size: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12 * size)


@settings(max_examples=200)
@given(rows(FEW) | rows(FINITE), st.integers(1, 3))
def test_one_read_is_as_good_as_many(value, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        quick, slow = _read_once(value), _read_each(value)
    finally: torch.set_num_threads(before)
    assert quick.histogram == slow.histogram and quick.places == slow.places
    for a, b in ((quick.low, slow.low), (quick.high, slow.high)): assert a.dtype == b.dtype and np.array_equal(a, b)
    size = value.double().abs().sum().item()
    assert same_sums(quick.total, slow.total, size) and same_sums(quick.squares, slow.squares, size**2)


@settings(max_examples=100)
@given(rows(FEW) | rows(FINITE))
def test_bfloat16_is_read_once_as_well(value):
    value = value.bfloat16()
    value = torch.where(value.isfinite(), value, 0)
    quick, slow = _read_once(value), _read_each(value)
    assert quick.histogram == slow.histogram and quick.histogram.exact and quick.places == slow.places
    assert np.array_equal(quick.low, slow.low) and np.array_equal(quick.high, slow.high)


@settings(max_examples=200)
@given(rows(FEW) | rows(FINITE), st.floats(0, 4), st.booleans())
def test_small_values_are_left_out_of_the_largest_and_nothing_else_changes(value, least, narrow):
    value = value.bfloat16() if narrow else value
    value = torch.where(value.isfinite(), value, 0)
    whole, part = read(value), read(value, least)
    assert part.places == [place for place in whole.places if abs(value[place].item()) >= least]
    assert part.histogram == whole.histogram and part.total == whole.total


def test_a_large_tensor_is_read_by_all_threads():
    value = torch.randn(3000, 200, generator=torch.Generator().manual_seed(0))
    for narrow in (value, value.bfloat16()):
        quick, slow = _read_once(narrow), _read_each(narrow)
        assert quick.histogram == slow.histogram and quick.places == slow.places and np.array_equal(quick.low, slow.low)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_nothing_is_left_in_the_counts_of_a_tensor_that_is_not_finite(what):
    good = torch.randn(30, 7)
    before = read(good)
    bad = good.clone()
    bad[2, 3] = what
    assert _read_once(bad) is None
    assert read(good).histogram == before.histogram


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_with_something_else_than_finite_numbers_is_asked_again(what):
    value = torch.randn(30, 7)
    value[11, 3] = what
    assert _read_once(value) is None
    stats = measure(value)
    rest = value[value.isfinite()]
    assert (stats.count, stats.nan + stats.inf, stats.min, stats.max) == (209, 1, rest.min().item(), rest.max().item())
    assert stats.first_nonfinite.position == (11, 3)
    assert math.isclose(stats.mean, rest.double().mean().item(), rel_tol=1e-12)


@pytest.mark.parametrize("value", [torch.randn(4, 6).half(), torch.randn(4, 6).double()])
def test_other_tensors_are_read_by_the_definition(value):
    assert _read_once(value) is None and measure(value).count == 24


def expected_places(value: torch.Tensor) -> list[tuple[int, int]]:
    "By sorting everything; of equals the first, no zeros."
    flat = value.double().abs().flatten()
    order = torch.sort(flat, descending=True, stable=True).indices[:N_EXTREMES].tolist()
    return [divmod(i, value.shape[1]) for i in order if flat[i]]


@settings(max_examples=200)
@given(rows(FEW) | rows(FINITE), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_largest_are_those_of_sorting(value, dtype):
    value = value.to(dtype)
    value = torch.where(value.isfinite(), value, 0)  # 3e38 is infinite in bfloat16's rounding of the largest floats
    assert largest_places(value, value.abs().amax(0)) == expected_places(value)


def test_the_largest_of_a_tensor_that_is_read_in_many_blocks():
    value = torch.ones(40_000, 10, dtype=torch.bfloat16)
    value[39_999, 9] = value[20_000, 4] = 2
    assert largest_places(value, value.abs().amax(0)) == expected_places(value) == [
        (20_000, 4), (39_999, 9), *((0, i) for i in range(6))
    ]
