"""The fast ways to a range against the definition: the same for whatever tensor, and the bounds hold."""
import contextlib
import math

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import given, settings
from hypothesis import strategies as st

from qcal_nb.observers import Observer
from qcal_nb.observers.search import best, bins, kernel as kernels
from qcal_nb.observers import sharing
from qcal_nb.observers.search.bins import Binned, bounded_search, error_bounds, error_by_kernel
from qcal_nb.observers.search.best import best_range
from qcal_nb.observers.imatrix import importance_range, weighted_error
from qcal_nb.observers.minmax import min_max
from qcal_nb.observers.search.definition import mse_range, search_error, shrink_search

ARGS = {
    "int8": dict(num_bits=8), "int8 asym": dict(num_bits=8, symmetric=False), "int4": dict(num_bits=4),
    "int2 asym": dict(num_bits=2, symmetric=False), "fp8": dict(num_bits=8, type="float"),
    "fp4": dict(num_bits=4, type="float")
}
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
    maxshrink=st.sampled_from([0.0, 0.2, 0.95, 1.0]), patience=st.sampled_from([0, 1, 5, 1000]),
    grid=st.sampled_from([20.0, 100.0]),
    norm=st.sampled_from([2.0, 2.4, 3.0]), expand=st.sampled_from([1.0, 1.8])))


@contextlib.contextmanager
def taken_for(size):
    "Tensors with one scale go where large ones go, to bounds and counts, or where small ones go, to the kernel."
    with pytest.MonkeyPatch.context() as patch:
        for module in (best, kernels): patch.setattr(module, "MANY", {"large": 1, "small": 1 << 30}[size])
        yield


SIZES_TAKEN_FOR = pytest.mark.parametrize("taken", ["large", "small"])


def tensor(kind, seed, size, rows, dtype):
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))
    return (KINDS[kind](x) * size).to(dtype).reshape(-1, 1, 64)


@SIZES_TAKEN_FOR
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=250, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 9999), size=SIZES, rows=st.sampled_from([1, 8, 100]),
       form=st.sampled_from(sorted(ARGS)), search=SEARCHES)
def test_the_range_is_that_of_the_definition(taken, dtype, kind, seed, size, rows, form, search):
    x = tensor(kind, seed, min(size, 1.0) if dtype == torch.float16 else size, rows, dtype)
    args = QuantizationArgs(strategy="tensor", **ARGS[form])
    with taken_for(taken): mine, plain = best_range(x, args, **search), mse_range(x, args, **search)
    if torch.equal(mine[0], plain[0]) and torch.equal(mine[1], plain[1]): return
    norm = search.get("norm", 2.4)  # nothing but a tie that the order of summation decides may differ
    a, b = (
        search_error(x.double() if dtype == torch.float32 else x, *ends, args, norm).item() for ends in (mine, plain)
    )
    assert math.isclose(a, b, rel_tol=1e-6), (mine, plain, a, b)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 9999), size=SIZES, form=st.sampled_from(sorted(ARGS)),
       norm=st.sampled_from([2.0, 2.4, 4.0]), p=st.floats(0.05, 1.8))
def test_the_bounds_hold(kind, seed, size, form, norm, p):
    x, args = tensor(kind, seed, size, 200, torch.float32), QuantizationArgs(strategy="tensor", **ARGS[form])
    low, high = min_max(x)
    if not 1e-6 < (high - low).item(): return  # goes to the definition
    [(least, most)] = error_bounds(Binned(x, low.item(), high.item()), low * p, high * p, args, norm)
    exact = search_error(x, low * p, high * p, args, norm).item()
    assert least <= exact <= most
    if max(-low.item(), high.item()) < 1e5 and exact > 1e-30:
        least, most = error_by_kernel(x, low * p, high * p, args, norm)
        assert least <= exact <= most


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 9999), size=SIZES, threads=st.integers(1, 3),
       piece=st.sampled_from([1, 700, 1 << 23]))
def test_every_value_is_in_its_bin(kind, seed, size, threads, piece):
    rows = 5 if piece == 1 else 200  # a piece of one value is a step of its own
    x, before = tensor(kind, seed, size, rows, torch.float32), torch.get_num_threads()
    if not 1e-6 < (x.max() - x.min()).item(): return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bins, "_MOST_PACKED", piece)  # values that one word counts before it is unpacked
        torch.set_num_threads(threads)
        try: binned = Binned(x, x.min().item(), x.max().item())
        finally: torch.set_num_threads(before)
    steps = torch.trunc(x.double().flatten() / binned.unit) * binned.unit  # what lies below a unit is cut off
    place = torch.bucketize(steps, torch.from_numpy(binned.edges).double(), right=True) - 1
    counts = torch.bincount(place, minlength=len(binned.counts))
    means = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, place, steps) / counts
    assert counts.tolist() == binned.counts.tolist() and len(counts) <= bins.BINS + 1
    assert torch.equal(means[counts > 0].float(), torch.from_numpy(binned.means)[counts > 0])
    assert ((steps - x.flatten()).abs() < binned.unit).all()


@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_bounds_decide_almost_everything(form):
    x = torch.randn(512, 1, 512, generator=torch.Generator().manual_seed(0))
    args = QuantizationArgs(strategy="tensor", **ARGS[form])
    asked, shrinks = [], [1 - i / 100 for i in range(20)]
    low, high = min_max(x)
    ends = error_bounds(
        Binned(x, low.item(), high.item()), low * torch.tensor(shrinks), high * torch.tensor(shrinks), args, 2.4
    )
    bounded_search(shrinks, ends, 5, math.inf, [
        lambda p: asked.append(p) or (search_error(x, low * p, high * p, args, 2.4).item(),) * 2
    ])
    assert len(asked) <= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@SIZES_TAKEN_FOR
@pytest.mark.parametrize("shape", [(40, 1, 64), (1, 9, 600), (1, 9, 100)], ids=["one scale", "long rows", "short rows"])
def test_searches_of_one_tensor_share_errors_and_nothing_else(dtype, shape, taken):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    args = QuantizationArgs(strategy="channel", **ARGS["int4"])
    searches = [
        dict(), dict(grid=50.0), dict(maxshrink=0.6), dict(norm=2.0), dict(expand=1.3), dict(patience=1),
        dict(grid=33.0, maxshrink=0.9)
    ]
    with taken_for(taken): alone = [best_range(x, args, **search) for search in searches]
    with sharing(), taken_for(taken):
        for order in (searches, searches[::-1]):
            for search, (low, high) in zip(order, alone if order is searches else alone[::-1]):
                mine = best_range(x, args, **search)
                assert torch.equal(mine[0], low) and torch.equal(mine[1], high), search
    assert len({tuple(high.flatten().tolist()) for _, high in alone}) > 2


def test_other_devices_go_to_the_definition():
    low = high = torch.zeros(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert best.way_for(torch.empty(1, 1, 4, dtype=dtype, device="meta"), low, high, 2.4) is None


def test_values_out_of_reach_go_to_the_definition():
    for odd in (1e-30, 1e30):
        x = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0)) * odd
        args = QuantizationArgs(strategy="tensor", **ARGS["int8"])
        assert all(torch.equal(a, b) for a, b in zip(best_range(x, args), mse_range(x, args)))
    x = torch.full((4, 1, 64), math.nan)
    assert all(
        torch.equal(a, b, ) or a.isnan().all() and b.isnan().all()
        for a, b in zip(best_range(x, args), mse_range(x, args))
    )


SCALES = {"channel": (), "rows of five": (5,), "groups": (4, 32)}  # how 128 values of a row are shared out


def weight(kind, seed, size, rows, groups, dtype):
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed))
    x = KINDS[kind](x) * size * torch.logspace(-2, 2, rows)[:, None]  # rows of very different size
    return (
        x.to(dtype).reshape(1, rows, *groups)
        if groups == (4, 32)
        else x.to(dtype).reshape(1, rows, 128)[..., :groups[0] if groups else None]
    )


def same_but_for_ties(mine, plain, error_of):
    "Equal, or where not, errors that only the order of summation tells apart."
    differ = (mine[0] != plain[0]) | (mine[1] != plain[1])
    if not differ.any(): return 0
    a, b = (error_of(*ends)[differ] for ends in (mine, plain))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    return int(differ.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 9999), size=SIZES, rows=st.sampled_from([2, 7, 60]),
       groups=st.sampled_from(sorted(SCALES)), form=st.sampled_from(sorted(ARGS)), search=SEARCHES)
def test_many_scales_are_those_of_the_definition(dtype, kind, seed, size, rows, groups, form, search):
    x = weight(kind, seed, min(size, 1.0), rows, SCALES[groups], dtype)
    args = QuantizationArgs(strategy="channel", **ARGS[form])
    mine, plain, norm = best_range(x, args, **search), mse_range(x, args, **search), search.get("norm", 2.4)
    wide = x.double() if dtype == torch.float32 else x
    same_but_for_ties(
        mine, plain, lambda low, high: search_error(wide, low.to(wide.dtype), high.to(wide.dtype), args, norm)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 9999), size=SIZES, rows=st.sampled_from([2, 7, 60]),
    groups=st.sampled_from(["channel", "groups"]), form=st.sampled_from(sorted(ARGS)), search=SEARCHES,
    weighted=st.booleans()
)
def test_weighted_scales_are_those_of_the_definition(dtype, kind, seed, size, rows, groups, form, search, weighted):
    x = weight(kind, seed, min(size, 1.0), rows, SCALES[groups], dtype)
    args = QuantizationArgs(strategy="channel", **ARGS[form])
    heard = (
        torch.rand(128, generator=torch.Generator().manual_seed(seed)).pow(8).expand(rows, 128).reshape(x.shape)
        if weighted
        else None
    )
    mine, norm = importance_range(x, args, heard, **search), search.get("norm", 3.0)
    low, high = (end * search.get("expand", 1.0) for end in min_max(x))
    grid = search.get("grid", 20)
    plain = shrink_search(
        low,
        high,
        [1 - i / grid for i in range(max(1, int(search.get("maxshrink", 0.95) * grid)) + 1)],
        search.get("patience", 5) or math.inf,
        lambda lo, hi: weighted_error(x, lo, hi, args, norm, heard),
    )
    same_but_for_ties(mine, plain, lambda lo, hi: weighted_error(x, lo, hi, args, norm, heard))


def test_patience_ends_the_search_for_all_scales_at_once():
    """Rows whose errors have two valleys: with patience for one, and for both; the kernel must stop where the
    definition does."""
    g, args = torch.Generator().manual_seed(0), QuantizationArgs(strategy="channel", num_bits=4)
    ends = set()
    for trial in range(200):
        x = torch.randn(1, 2, 12, generator=g) * torch.tensor([1.0] * 11 + [3.0])
        for patience in (1, 2, 3, 5, 8):
            mine, plain = (way(x, args, maxshrink=0.9, grid=40.0, patience=patience) for way in (best_range, mse_range))
            assert torch.equal(mine[1], plain[1]), (trial, patience)
            ends.add(tuple(mine[1].flatten().tolist()))
    assert len(ends) > 200  # patience made a difference: more results than tensors


def test_threads_and_shapes_do_not_matter():
    args = QuantizationArgs(strategy="group", group_size=32, num_bits=4)
    x = torch.randn(1, 700, 40, 32, generator=torch.Generator().manual_seed(1))
    alone, before = mse_range(x, args), torch.get_num_threads()
    try:
        for many in (1, 2, 3):
            torch.set_num_threads(many)
            mine = best_range(x, args)
            assert same_but_for_ties(
                mine, alone, lambda low, high: search_error(x.double(), low.double(), high.double(), args, 2.4)
            ) <= 3
    finally: torch.set_num_threads(before)
    split = best_range(x.reshape(2, 350, 40, 32), args)  # two observations of each scale
    assert torch.equal(split[1], mse_range(x.reshape(2, 350, 40, 32), args)[1])


def test_what_the_kernel_does_not_take_goes_to_the_definition():
    args = QuantizationArgs(strategy="channel", num_bits=4)
    for odd in (
        torch.randn(1, 5, 64, dtype=torch.float64), torch.randn(1, 5, 64) * 1e30, torch.full((1, 5, 64), math.nan)
    ):
        mine, plain = best_range(odd, args), mse_range(odd, args)
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(mine, plain))
    x = torch.randn(1, 5, 64)
    assert torch.equal(best_range(x, args, norm=9.0)[1], mse_range(x, args, norm=9.0)[1])


@pytest.mark.parametrize("name", ["mse", "minmax", "static_minmax"])
def test_observers_of_one_tensor_share_one_look(name, monkeypatch):
    looks, x = [], torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    for place, what in (
        ("qcal_nb.observers.minmax.min_max", "min_max"), ("qcal_nb.observers.mse.best_range", "best_range")
    ):
        module, function = place.rsplit(".", 1)
        original = getattr(__import__(module, fromlist=[function]), function)
        monkeypatch.setattr(
            place, lambda *a, original=original, what=what, **k: looks.append(what) or original(*a, **k)
        )
    args = QuantizationArgs(strategy="tensor", **ARGS["int8"])
    q, k, v, other = (Observer.load_from_registry(name, base_name="input", args=args) for _ in range(4))
    alone = Observer.load_from_registry(name, base_name="input", args=args)
    with sharing():
        for o in (q, k, v): o(x)
        other(x * 2)
    assert looks.count("best_range" if name == "mse" else "min_max") == 2
    alone(x)
    for o in (q, k, v): assert torch.equal(o.min_vals, alone.min_vals) and torch.equal(o.max_vals, alone.max_vals)
    # no two hold the same tensor: ranks reduce them in place
    assert len({o.min_vals.data_ptr() for o in (q, k, v)}) == 3
    y = x.clone()
    with sharing():
        q(y)
        y.mul_(3)
        k(y)
    assert not torch.equal(q.max_vals, k.max_vals)
