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
from qcal_nb.stats.tensor import _read_each, _read_once, largest_places

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, -3e38, 0.1])  # ties, zeros of both signs, the ends of float32
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rows(elements): return hnp.arrays(np.float32, SHAPES, elements=elements).map(torch.from_numpy)


def same_sums(a: Fraction, b: Fraction, size: float) -> bool: return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-12 * size)


@settings(max_examples=200)
@given(rows(FEW) | rows(FINITE), st.integers(1, 3))
def test_one_read_is_as_good_as_many(value, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        quick, slow = _read_once(value), _read_each(value)
    finally: torch.set_num_threads(before)
    for a, b in zip(quick[:3], slow[:3]): assert a.dtype == b.dtype and torch.equal(a, b)
    size = value.double().abs().sum().item()
    assert same_sums(quick[3], slow[3], size) and same_sums(quick[4], slow[4], size**2)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_a_tensor_with_something_else_than_finite_numbers_is_asked_again(what):
    value = torch.randn(30, 7)
    value[11, 3] = what
    assert _read_once(value) is None
    stats = measure(value)
    rest = value[value.isfinite()]
    assert (stats.count, stats.nan + stats.inf, stats.min, stats.max) == (209, 1, rest.min().item(), rest.max().item())
    assert stats.first_nonfinite.position == (11, 3) and math.isclose(stats.mean, rest.double().mean().item(), rel_tol=1e-12)


@pytest.mark.parametrize("value", [torch.randn(4, 6).T, torch.randn(4, 6).half(), torch.randn(4, 6).bfloat16(), torch.randn(4, 6).double()])
def test_other_tensors_are_read_by_the_definition(value): assert _read_once(value) is None and measure(value).count == 24


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
    assert largest_places(value, value.abs().amax(0)) == expected_places(value) == [(20_000, 4), (39_999, 9), *((0, i) for i in range(6))]
