"""The fast ways to a range against the definition: the same for whatever tensor, and the bounds hold."""
import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import given, settings
from hypothesis import strategies as st

from qcal_nb.observers import Observer, bounds
from qcal_nb.observers.base import sharing
from qcal_nb.observers.bounds import Binned, best_range, bounded_search, error_bounds
from qcal_nb.observers.minmax import min_max
from qcal_nb.observers.search import mse_range, search_error

ARGS = {"int8": dict(num_bits=8), "int8 asym": dict(num_bits=8, symmetric=False), "int4": dict(num_bits=4),
        "int2 asym": dict(num_bits=2, symmetric=False), "fp8": dict(num_bits=8, type="float"), "fp4": dict(num_bits=4, type="float")}
KINDS = {
    "bell": lambda x: x,
    "one side": lambda x: x.relu(),
    "far from zero": lambda x: x * 0.01 + 5,
    "few values": lambda x: (x * 3).round() * 0.37,
    "one value": lambda x: torch.full_like(x, 0.3),
    "on the grid": lambda x: (x * 40).round().clamp(-127, 127),
    "heavy tails": lambda x: x * x.abs() ** 3,
    "outlier channels": lambda x: x * torch.where(torch.arange(x.shape[-1]) % 13 == 3, 60.0, 1.0),
    "nearly all zero": lambda x: torch.where(x > 2.5, x, 0),
    "uniform": lambda x: torch.erf(x),
    "one huge value": lambda x: torch.cat([x.flatten()[:-1], torch.tensor([1e4])]).reshape(x.shape),
}
SIZES = st.sampled_from([1e-4, 1.0, 37.0, 1e4])
SEARCHES = st.fixed_dictionaries({}, optional=dict(
    maxshrink=st.sampled_from([0.0, 0.2, 0.95, 1.0]), patience=st.sampled_from([0, 1, 5, 1000]), grid=st.sampled_from([20.0, 100.0]),
    norm=st.sampled_from([2.0, 2.4, 3.0]), expand=st.sampled_from([1.0, 1.8])))


@pytest.fixture(autouse=True)
def _however_small(monkeypatch): monkeypatch.setattr(bounds, "MANY", 1)


def tensor(kind, seed, size, rows, dtype):
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    return (KINDS[kind](x) * size).to(dtype).reshape(-1, 1, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=250, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 9999), size=SIZES, rows=st.sampled_from([1, 8, 100]),
       form=st.sampled_from(sorted(ARGS)), search=SEARCHES)
def test_the_range_is_that_of_the_definition(dtype, kind, seed, size, rows, form, search):
    x, args = tensor(kind, seed, min(size, 1.0) if dtype == torch.float16 else size, rows, dtype), QuantizationArgs(strategy="tensor", **ARGS[form])
    mine, plain = best_range(x, args, **search), mse_range(x, args, **search)
    if torch.equal(mine[0], plain[0]) and torch.equal(mine[1], plain[1]): return
    norm = search.get("norm", 2.4)  # nothing but a tie that the order of summation decides may differ
    a, b = (search_error(x.double() if dtype == torch.float32 else x, *ends, args, norm).item() for ends in (mine, plain))
    assert math.isclose(a, b, rel_tol=1e-6), (mine, plain, a, b)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 9999), size=SIZES, form=st.sampled_from(sorted(ARGS)),
       norm=st.sampled_from([2.0, 2.4, 4.0]), p=st.floats(0.05, 1.8))
def test_the_bounds_hold(kind, seed, size, form, norm, p):
    x, args = tensor(kind, seed, size, 200, torch.float32), QuantizationArgs(strategy="tensor", **ARGS[form])
    low, high = min_max(x)
    if not 1e-6 < (high - low).item(): return  # goes to the definition
    [(least, most)] = error_bounds(Binned(x, norm), low * p, high * p, args)
    exact = search_error(x, low * p, high * p, args, norm).item()
    assert least <= exact <= most


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_bounds_decide_almost_everything(form):
    x = torch.randn(512, 1, 512, generator=torch.Generator().manual_seed(0))
    args, asked, shrinks, (low, high) = QuantizationArgs(strategy="tensor", **ARGS[form]), [], [1 - i / 100 for i in range(20)], min_max(x)
    ends = error_bounds(Binned(x, 2.4), low * torch.tensor(shrinks), high * torch.tensor(shrinks), args)
    bounded_search(shrinks, ends, 5, lambda p: asked.append(p) or search_error(x, low * p, high * p, args, 2.4).item())
    assert len(asked) <= 6


def test_values_out_of_reach_go_to_the_definition():
    for odd in (1e-30, 1e30):
        x = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0)) * odd
        args = QuantizationArgs(strategy="tensor", **ARGS["int8"])
        assert all(torch.equal(a, b) for a, b in zip(best_range(x, args), mse_range(x, args)))
    x = torch.full((4, 1, 64), math.nan)
    assert all(torch.equal(a, b, ) or a.isnan().all() and b.isnan().all() for a, b in zip(best_range(x, args), mse_range(x, args)))


@pytest.mark.parametrize("name", ["mse", "minmax", "static_minmax"])
def test_observers_of_one_tensor_share_one_look(name, monkeypatch):
    looks, x = [], torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    for place, what in (("qcal_nb.observers.minmax.min_max", "min_max"), ("qcal_nb.observers.mse.best_range", "best_range")):
        module, function = place.rsplit(".", 1)
        original = getattr(__import__(module, fromlist=[function]), function)
        monkeypatch.setattr(place, lambda *a, original=original, what=what, **k: looks.append(what) or original(*a, **k))
    args = QuantizationArgs(strategy="tensor", **ARGS["int8"])
    q, k, v, other = (Observer.load_from_registry(name, base_name="input", args=args) for _ in range(4))
    alone = Observer.load_from_registry(name, base_name="input", args=args)
    with sharing():
        for o in (q, k, v): o(x)
        other(x * 2)
    assert looks.count("best_range" if name == "mse" else "min_max") == 2
    alone(x)
    for o in (q, k, v): assert torch.equal(o.min_vals, alone.min_vals) and torch.equal(o.max_vals, alone.max_vals)
    assert len({o.min_vals.data_ptr() for o in (q, k, v)}) == 3  # no two hold the same tensor: ranks reduce them in place
    y = x.clone()
    with sharing():
        q(y)
        y.mul_(3)
        k(y)
    assert not torch.equal(q.max_vals, k.max_vals)
