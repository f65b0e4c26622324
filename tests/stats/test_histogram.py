"""The mergeable histogram against sorting, counting and summing the values themselves, for all values, shapes and
splits."""
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcal_nb.stats import Histogram, bucket_counts, cells, is_bfloat16, sum_of
from qcal_nb.stats.histogram import Buckets, representatives

BITS = {
    torch.float32: (np.uint32, torch.int32), torch.bfloat16: (np.uint16, torch.int16),
    torch.float16: (np.uint16, torch.int16)
}


def from_bits(bits, dtype): return torch.from_numpy(bits.view(bits.dtype.str.replace("u", "i"))).view(dtype)


SHAPES = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6)


def any_bits(dtype, shape=SHAPES):
    "Tensors of any bit pattern whatever: NaNs with every payload, infinities, -0.0, subnormals."
    return hnp.arrays(BITS[dtype][0], shape).map(lambda bits: from_bits(bits, dtype))


ANY = st.sampled_from(list(BITS)).flatmap(any_bits)
FINITE = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=1, max_side=40),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
).map(torch.from_numpy)
SAMPLE = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e4, 1e4, width=32)).map(torch.from_numpy)
# the smallest positive float32, the ends of the subnormal and of the normal range, zeros, and NaNs that differ from
# infinity in the lower bits only
ODD = from_bits(
    np.array(
        [
            0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0xFF800000, 0xFF80FFFF,
            0x80000000, 0x80000001
        ],
        np.uint32,
    ),
    torch.float32,
)


def expected(value):
    "Counts by the definition, element by element, in Python."
    buckets, apart = Counter(), Counter()
    for x in value.float().flatten():
        if x.isnan(): apart["nan"] += 1
        elif x.isinf(): apart["pos_inf" if x > 0 else "neg_inf"] += 1
        else: buckets[x.view(torch.int32).item() >> 16 & 0xFFFF] += 1
    return buckets, apart


def raw(codes): return [c if c >= 0 else 0x8000 + (-1 - c) for c in codes.tolist()]


@given(ANY)
@example(ODD)
def test_the_upper_16_bits_name_the_bucket_and_nonfinite_values_fall_out(value):
    h, (buckets, apart) = Histogram.of(value), expected(value)
    assert dict(zip(raw(h.codes), h.counts.tolist())) == buckets
    assert (h.nan, h.pos_inf, h.neg_inf) == (apart["nan"], apart["pos_inf"], apart["neg_inf"])
    assert h.count + h.nan + h.pos_inf + h.neg_inf == value.numel()
    assert (np.diff(h.codes.astype(int)) > 0).all() and h.counts.dtype == np.int64


@given(ANY, ANY, ANY)
def test_merging_is_associative_and_commutative_to_the_bit(x, y, z):
    a, b, c = (Histogram.of(t) for t in (x, y, z))
    assert a | b == b | a and (a | b) | c == a | (b | c) and a | Histogram() == a
    assert a | b | c == Histogram.of(torch.cat([t.flatten().float() for t in (x, y, z)]))
    assert hash(a | b) == hash(b | a)


@given(
    st.sampled_from(list(BITS)).flatmap(lambda d: any_bits(d, st.integers(0, 60))),
    st.lists(st.integers(0, 60), max_size=5),
    st.randoms(),
)
def test_any_split_in_any_order_is_the_whole(value, cuts, random):
    parts = list(torch.tensor_split(value, sorted(cuts)))
    random.shuffle(parts)
    dense, merged = None, Histogram()
    for part in parts: dense, merged = bucket_counts(part, dense), merged | Histogram.of(part)
    assert torch.equal(dense, bucket_counts(value)) and merged == Histogram.of(value)
    assert Histogram.from_dense(dense, is_bfloat16(value)) == merged


@given(ANY)
def test_the_dtype_that_carries_the_values_does_not_matter(value):
    assert Histogram.of(value) == Histogram.of(value.float()) == Histogram.of(value.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.T, lambda x: x[:, ::2], lambda x: x[::3], lambda x: x.view(2, -1, 40, 20).permute(3, 0, 2, 1),
        lambda x: x[:0], lambda x: x[0, 0], lambda x: x.expand(3, *x.shape), lambda x: x[:, :1],
        lambda x: x[None, :, 7:, None], lambda x: x.flip(0)
    ],
    ids=[
        "transposed", "every other column", "every third row", "permuted", "empty", "scalar", "expanded", "one column",
        "offset", "flipped"
    ],
)
def test_any_strides(dtype, reshape):
    torch.manual_seed(0)
    value = reshape(torch.randn(1600, 400).to(dtype))
    counts = bucket_counts(value)
    assert torch.equal(counts, bucket_counts(value.clone(memory_format=torch.contiguous_format)))
    assert counts.sum() == value.numel()


def test_rows_longer_than_a_piece():
    value = torch.randn(2, 3, 600_000)[:, :2, 1::2]
    assert torch.equal(bucket_counts(value), bucket_counts(value.contiguous()))


def test_dense_counts_are_never_changed_in_place():
    before = bucket_counts(torch.ones(3))
    kept = before.clone()
    after = bucket_counts(torch.ones(2), before)
    assert torch.equal(before, kept) and after.data_ptr() != before.data_ptr() and after.sum() == 5


@pytest.mark.parametrize(
    "value", [torch.arange(3), torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.complex64), [1.0, 2.0]]
)
def test_what_is_not_floating_point_is_refused(value):
    for function in (bucket_counts, is_bfloat16, Histogram.of):
        with pytest.raises(TypeError, match="value must be a tensor of floating point numbers, got"): function(value)


def test_gradients_are_not_recorded():
    assert not bucket_counts(torch.ones(3, requires_grad=True)).requires_grad


def test_a_gradient_carrying_and_an_inference_tensor_can_be_counted():
    with torch.inference_mode(): value = torch.randn(10)
    assert Histogram.of(value).count == 10 and Histogram.of(torch.randn(10, requires_grad=True)).count == 10


def test_float64_beyond_float32_counts_as_infinite():
    h = Histogram.of(torch.tensor([1e300, -1e300, 1.0], dtype=torch.float64))
    assert (h.pos_inf, h.neg_inf, h.count) == (1, 1, 1)


@pytest.mark.parametrize("n", [2**24, 2**31, 2**53 + 1])
def test_counts_go_beyond_what_float32_and_float64_can_count(n):
    many = bucket_counts(torch.ones(1)) * n
    h = Histogram.from_dense(bucket_counts(torch.ones(1), many), exact=True)
    assert h.count == n + 1 and (h | h).count == 2 * n + 2 and h.outside(2, 3) == n + 1 and h.quantile(0.5) == 1


@given(ANY)
def test_exact_is_whether_bfloat16_holds_every_finite_value(value):
    wide = value.float()
    wide = wide[wide.isfinite()]
    assert is_bfloat16(value) == torch.equal(wide.bfloat16().float(), wide)


def test_one_value_that_is_not_bfloat16_is_found_wherever_it_is():
    value = torch.ones(3 * 2**18)
    for place in (0, 1023, 1024, 2**18, 3 * 2**18 - 1):
        other = value.clone()
        other[place] = 1.001
        assert is_bfloat16(value) and not is_bfloat16(other)


# --- what a bucket stands for ---

FINITE_CODES = np.arange(-0x7F80, 0x7F80).astype(np.int16)


def test_every_bucket_lies_between_its_neighbours_and_is_narrow():
    low, high = cells(FINITE_CODES, exact=False)
    middle, value = representatives(FINITE_CODES, False), representatives(FINITE_CODES, True)
    assert (low[1:] == high[:-1]).all() and ((low <= middle) & (middle <= high)).all() and (np.diff(value) >= 0).all()
    normal = np.minimum(abs(low), abs(high)) >= 2.0**-126
    assert (high - low <= 2.0**-7 * np.minimum(abs(low), abs(high)))[normal].all()
    assert (high - low == 2.0**-133)[~normal].all() and middle[FINITE_CODES == 0] == 0 and high[-1] == 2.0**128
    nearest_low, nearest_high = cells(FINITE_CODES, exact=True)
    assert ((nearest_low <= value) & (value <= nearest_high)).all() and (nearest_low[1:] == nearest_high[:-1]).all()


@given(FINITE)
def test_representatives_are_within_their_bound(x):
    h = Histogram.of(x)
    places = np.searchsorted(h.codes, [Histogram.of(v).codes[0] for v in x])
    wide = x.double().numpy()
    assert (abs(h.values[places] - wide) <= 2.0**-8 * abs(wide) + 2.0**-133).all()
    low, high = h.bounds
    assert low <= wide.min() and wide.max() <= high


@given(any_bits(torch.bfloat16, st.integers(1, 40)))
def test_bfloat16_is_exact(value):
    h, fine = Histogram.of(value), value.double()[value.isfinite()].numpy()
    assert h.exact and np.array_equal(np.repeat(h.values, h.counts), np.sort(fine))
    if len(fine): assert h.bounds == (fine.min(), fine.max())


# --- questions ---

def neighbours(x, q):
    "The two values between which a quantile lies, and numpy's quantile: all in float64 by sorting."
    s, rank = np.sort(x.double().numpy()), q * (len(x) - 1)
    return s[int(np.floor(rank))], s[int(np.ceil(rank))], np.quantile(s, q)


@given(SAMPLE, st.floats(0, 1))
@example(torch.tensor([-1.0, 1.0]), 0.5)
def test_quantiles_are_those_of_sorting_within_the_bound(x, q):
    for data, h in ((x, Histogram.of(x)), (x.abs(), Histogram.of(x).abs())):
        below, above, exact = neighbours(data, q)
        assert abs(h.quantile(q) - exact) <= 2.0**-8 * max(abs(below), abs(above)) + 2.0**-133 + 1e-12
    half = x.bfloat16()
    assert np.isclose(Histogram.of(half).quantile(q), neighbours(half, q)[2], rtol=1e-12, atol=1e-12)


def test_quantiles_agree_with_torch():
    torch.manual_seed(0)
    x, q = torch.randn(100_001) * torch.rand(100_001), torch.tensor([0.0, 0.001, 0.2, 0.5, 0.77, 0.999, 1.0])
    got, exact = Histogram.of(x).quantile(q.numpy()), torch.quantile(x, q)
    assert np.allclose(got, exact.numpy(), rtol=2**-8, atol=1e-6)


@given(SAMPLE, st.floats(-2e4, 2e4), st.floats(0, 3e4))
def test_outside_is_certain_and_short_of_the_truth_by_two_buckets_at_most(x, low, width):
    h, high = Histogram.of(x), low + width
    truth = int(((x.double() < low) | (x.double() > high)).sum())
    lower, upper = cells(h.codes, h.exact)
    cut = ((lower <= low) & (low <= upper)) | ((lower <= high) & (high <= upper))
    assert truth - h.counts[cut].sum() <= h.outside(low, high) <= truth
    half = x.bfloat16()
    assert Histogram.of(half).outside(low, high) == int(((half.double() < low) | (half.double() > high)).sum())


@given(FINITE.filter(lambda x: x.abs().max() < 1e30), st.integers(1, 300), st.booleans())
def test_a_linear_view_keeps_the_total(x, bins, default):
    h = Histogram.of(x)
    low, high = (None, None) if default else (-1.5, 2.5)
    counts, edges = h.linear(bins, low, high)
    assert len(counts) == bins and len(edges) == bins + 1 and (counts >= 0).all()
    assert np.isclose(counts.sum(), x.numel(), rtol=1e-12)
    if default: assert edges[0] <= x.min() and x.max() <= edges[-1]


def test_a_linear_view_is_the_histogram():
    "Against np.histogram: running counts differ by no more than the values that share a bucket with an edge."
    torch.manual_seed(0)
    x = torch.randn(200_000)
    counts, edges = Histogram.of(x).linear(64, -5.0, 5.0)
    exact = np.histogram(x.clamp(-5, 5).numpy(), edges)[0]
    for edge, got, want in zip(edges[1:-1], counts.cumsum(), exact.cumsum()):
        assert abs(got - want) <= ((x - edge).abs() <= 2**-7 * abs(edge)).sum() + 1
    assert abs(counts - exact).max() < 0.02 * exact.max()


def test_a_single_point_is_where_it_belongs():
    counts, _ = Histogram.of(torch.tensor([0.5, 2.5, 2.5, 99.0])).linear(4, 0.0, 4.0)
    assert counts.tolist() == [1, 0, 2, 1]  # what lies beyond is in the last bin


@pytest.mark.parametrize("call, words", [
    (lambda h: h.linear(0), "bins=0 must be an int of at least 1"), (lambda h: h.linear(2.5), "bins=2.5"),
    (lambda h: h.linear(True), "bins=True"),
    (lambda h: h.linear(4, 1.0, 1.0), "low=1.0, high=1.0 must be finite, low < high"),
    (lambda h: h.linear(4, 0.0, np.inf), "high=inf"),
    (lambda h: h.linear(4, np.nan, 1.0), "low=nan"),
    (lambda h: h.quantile(1.5), "q=1.5 must be a share between 0 and 1"),
    (lambda h: h.quantile(np.nan), "q=nan"), (lambda h: h.quantile([0.5, -1]), "must be a share"),
    (lambda h: sum_of(h, lambda x: x.sum()), r"fn must keep the shape \(4,\), it returned \(\)")])
def test_questions_that_make_no_sense(call, words):
    with pytest.raises(ValueError, match=words): call(Histogram.of(torch.tensor([0.3])))


def test_without_values_the_answers_are_empty():
    for h in (Histogram(), Histogram.of(torch.ones(0)), Histogram.of(torch.tensor([np.nan, np.inf]))):
        assert h.count == 0 and np.isnan(h.quantile(0.5)) and np.isnan(h.bounds).all() and h.outside(0, 1) == 0
        assert h.linear(3)[0].sum() == 0 and sum_of(h, torch.abs) == 0 and h.abs().count == 0
        assert "Histogram(0 values" in repr(h)


@given(any_bits(torch.bfloat16, st.integers(0, 60)))
def test_sums_over_bfloat16_are_exact(value):
    fine = value[value.isfinite()]
    got = sum_of(Histogram.of(value), lambda x: x.clamp(-1e4, 1e4).double().square(), dtype=torch.bfloat16)
    assert np.isclose(got, fine.clamp(-1e4, 1e4).double().square().sum().item(), rtol=1e-12)


def test_the_error_of_quantizing_is_estimated_to_one_percent():
    "Where a bucket is as wide as a step or half of it, its middle alone misleads."
    torch.manual_seed(0)
    worst = {1: 0.0, 4: 0.0}
    for top, x in (
        (1.0, torch.randn(300_000)), (1.3, torch.rand(300_000) * 2 - 1), (1.99, torch.randn(300_000)),
        (2.0, torch.rand(300_000))
    ):
        x = x / x.abs().max() * top
        for step in (top / 127.5, top / 127, 2**-6):
            def error(v, step=step): return (torch.round(v / step).clamp(-128, 127) * step - v).square()
            exact, h = error(x.double()).sum().item(), Histogram.of(x)
            for points in worst: worst[points] = max(worst[points], abs(sum_of(h, error, points=points) / exact - 1))
    assert worst[4] < 1e-2 and worst[1] > 5e-2, worst


@given(ANY)
def test_abs_folds(value):
    assert Histogram.of(value).abs() == Histogram.of(value.float().abs())


# --- a value: saved, compared, immutable ---

@given(ANY)
def test_arrays_and_pickles_bring_it_back(value):
    h = Histogram.of(value)
    assert Histogram.from_arrays(h.arrays()) == h == pickle.loads(pickle.dumps(h))
    assert h != Histogram.of(torch.cat([value.flatten().float(), torch.ones(1)])) and h != 3


def test_it_cannot_be_changed():
    h = Histogram.of(torch.ones(3))
    for array in (h.codes, h.counts, h.arrays()["counts"]):
        with pytest.raises(ValueError, match="read-only"): array[0] = 5
    with pytest.raises(AttributeError): h.nan = 3
    mine = np.array([1, 2])
    kept = Buckets([3, 4], mine)
    mine[0] = 7
    assert kept.counts.tolist() == [1, 2]


GOOD = dict(codes=np.array([3, 9], np.int16), counts=np.array([1, 2]), rest=np.array([0, 0, 0, 1]))


@pytest.mark.parametrize("bad, words", [
    (dict(codes=np.array([9, 3], np.int16)), "codes must ascend"),
    (dict(codes=np.array([3, 3], np.int16)), "codes must ascend"),
    (dict(codes=np.array([3, 0x7F80], np.int16)), "codes must be those of finite numbers"),
    (dict(counts=np.array([1, 0])), "counts must be positive, got 0"),
    (dict(counts=np.array([1, 2, 3])), r"one shape \(n,\), got \(2,\) and \(3,\)"),
    (dict(counts=np.array([1.0, 2.0])), "counts must be int64"),
    (dict(codes=np.array([3, 9])), "codes must be int16"),
    (dict(rest=np.array([0, 0, 0])), "rest must be counts"),
    (dict(rest=np.array([0, -1, 0, 1])), "rest must be counts"),
    (dict(rest=np.array([0, 0, 0, 2])), "rest must be counts"),
])
def test_damaged_arrays_are_refused(bad, words):
    assert Histogram.from_arrays(GOOD).count == 3
    with pytest.raises(ValueError, match=words): Histogram.from_arrays(GOOD | bad)


@pytest.mark.parametrize("name", GOOD)
def test_missing_arrays_are_named(name):
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        Histogram.from_arrays({k: v for k, v in GOOD.items() if k != name})


def test_merging_with_something_else_is_refused():
    with pytest.raises(TypeError): Histogram() | 3
