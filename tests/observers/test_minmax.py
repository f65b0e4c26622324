"""Observers of extremes, for all values and orders, searched by hypothesis."""
import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcal_nb.observers import Observer
from qcal_nb.stats import TensorStats, measure
from qcal_nb.schemes import preset

FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
INPUT = preset("INT8_STATIC").input_activations


def tensors(shape=(2, 3, 4)): return hnp.arrays(np.float32, shape, elements=FLOATS).map(torch.from_numpy)


STREAMS = st.lists(tensors(), min_size=1, max_size=6)


def observed(name, stream, **kwargs):
    observer = Observer.load_from_registry(name, base_name="input", args=INPUT, **kwargs)
    for tensor in stream: observer(tensor)
    return observer


@given(STREAMS, st.randoms())
def test_static_minmax_is_the_range_of_everything_in_any_order(stream, random):
    everything, shuffled = torch.stack(stream), random.sample(stream, len(stream))
    for order in (stream, shuffled):
        observer = observed("static_minmax", order)
        assert (observer.min_vals.item(), observer.max_vals.item()) == (
            everything.min().item(), everything.max().item()
        )


@given(STREAMS, st.floats(1e-3, 1.0))
def test_minmax_is_an_exponential_moving_average(stream, c):
    "Against the closed form in float64: weights c (1-c)^(n-i), and (1-c)^n for the first."
    observer, n = observed("minmax", stream, averaging_constant=c), len(stream) - 1
    weights = [(1 - c) ** n] + [c * (1 - c) ** (n - i) for i in range(1, n + 1)]
    for got, values in (
        (observer.min_vals, [t.min().item() for t in stream]), (observer.max_vals, [t.max().item() for t in stream])
    ):
        expected = sum(w * v for w, v in zip(weights, values))
        assert math.isclose(got.item(), expected, rel_tol=1e-4, abs_tol=1e-5 * max(map(abs, values)))


@given(STREAMS)
def test_memoryless_minmax_is_the_last_one(stream):
    assert observed("memoryless_minmax", stream).max_vals.item() == stream[-1].max().item()


@given(STREAMS)
def test_asking_changes_nothing(stream):
    observer = observed("minmax", stream)
    before = {k: v.clone() for k, v in observer.get_statistics().items()}
    first, second = observer.get_qparams(), observer.get_qparams()
    assert torch.equal(first["scale"], second["scale"])
    assert all(torch.equal(v, before[k]) for k, v in observer.get_statistics().items())


@given(STREAMS)
def test_statistics_of_parts_are_those_of_the_whole(stream):
    parts, whole = TensorStats(), measure(torch.stack(stream))
    for tensor in stream: parts |= measure(tensor)
    assert (parts.count, parts.min, parts.max) == (whole.count, whole.min, whole.max)
    assert math.isclose(parts.mean, whole.mean, rel_tol=1e-9, abs_tol=1e-9)
    assert math.isclose(parts.std, whole.std, rel_tol=1e-6, abs_tol=1e-4)
