"""What a record says of a tensor, against brute force: any split, order and width."""
import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcal_nb.stats import is_bfloat16
from qcal_nb.stats import TensorStats, measure, same_stats
from tests.records.samples import DTYPES, exact, merged, tensor_of


def elements(batch, x):
    "(value, batch, position, channel) of every element; None for what float32 does not hold."
    for place in itertools.product(*map(range, x.shape)):
        value = x[place].item()
        yield value, batch, place[:-1] or (0,), place[-1]


def finite(value): return math.isfinite(torch.tensor(value, dtype=torch.float64).float().item())


def code_of(value):
    word = int(np.float32(value).view(np.uint32)) >> 16
    return word if word < 0x8000 else -1 - (word - 0x8000)


def check_against_brute_force(stats: TensorStats, seen: dict[int, torch.Tensor]):
    everything = [e for i, x in seen.items() for e in elements(i, x)]
    good, bad = [e for e in everything if finite(e[0])], [e for e in everything if not finite(e[0])]
    values = [e[0] for e in good]
    assert (stats.count, stats.nan + stats.inf, stats.numel) == (len(good), len(bad), len(everything))
    assert stats.nan == sum(math.isnan(e[0]) for e in bad)
    if good: assert (stats.min, stats.max) == (min(values), max(values))
    assert dict(zip(stats.histogram.codes.tolist(), stats.histogram.counts.tolist())) == Counter(map(code_of, values))
    for k in range(max(stats.levels, default=0) + 2):
        h = stats.up_to(k).histogram
        assert dict(zip(h.codes.tolist(), h.counts.tolist())) == Counter(code_of(v) for v, i, *_ in good if i < 2**k)
    channels = max(x.shape[-1] for x in seen.values())
    assert stats.channels.tolist() == [
        max((abs(v) for v, *_, c in good if c == channel), default=0.0) for channel in range(channels)
    ]
    assert not np.signbit(stats.channels).any()
    largest = sorted((e for e in good if e[0]), key=lambda e: (-abs(e[0]), *e[1:]))[:8]
    assert [(t.value, t.batch, t.position, t.channel) for t in stats.top] == largest
    first = min(bad, key=lambda e: (e[1], *e[2:]), default=None)
    assert (first is None) == (stats.first_nonfinite is None)
    if first: assert (stats.first_nonfinite.batch, stats.first_nonfinite.position) == (first[1], (*first[2], first[3]))
    assert stats.dtypes == {str(x.dtype)[6:] for x in seen.values()}
    assert stats.shapes == tuple(sorted({tuple(x.shape) for x in seen.values()}))
    assert (stats.calls, stats.batches) == (len(seen), len(seen))
    check_moments(stats, values)


def check_moments(stats, values):
    "Mean and standard deviation, to 1e-12 of the mean size and the mean square: that is what sums in float64 can hold."
    if not values:
        assert math.isnan(stats.mean) and math.isnan(stats.std)
        return
    numbers = [Fraction(v) for v in values]
    mean, square = sum(numbers) / len(numbers), sum(n * n for n in numbers) / len(numbers)
    assert abs(Fraction(stats.mean) - mean) <= Fraction(1e-12) * sum(map(abs, numbers)) / len(numbers)
    assert abs(Fraction(stats.std) ** 2 - (square - mean * mean)) <= Fraction(1e-12) * square


@settings(max_examples=80)
@given(st.integers(0, 2**32))
def test_any_split_any_order_any_grouping_is_the_whole(seed):
    rng = random.Random(seed)
    channels, count = rng.choice([1, 3, 8, 12]), rng.randint(1, 7)
    indices = rng.sample(range(0, rng.choice([7, 20, 4000])), count)
    seen = {i: tensor_of(rng, channels) for i in indices}
    parts = [measure(x, i) for i, x in seen.items()]
    whole = merged(parts, random.Random(0))
    check_against_brute_force(whole, seen)
    for _ in range(3): assert exact(merged(parts, rng)) == exact(whole)
    assert same_stats(whole, merged(parts, rng))
    assert exact(whole | TensorStats()) == exact(TensorStats() | whole) == exact(whole)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_the_same_values_of_another_width(seed):
    "Channels that only one side has seen count as zero, whichever side that is."
    rng = random.Random(seed)
    seen = {i: tensor_of(rng, rng.choice([2, 5, 9])) for i in range(4)}
    parts = [measure(x, i) for i, x in seen.items()]
    whole = merged(parts, rng)
    assert exact(whole) == exact(merged(parts, rng))
    check_against_brute_force(whole, seen)


@pytest.mark.parametrize(
    "indices", [range(1000), range(0, 4096, 3), range(5, 3000, 8), [0, 2**20, *range(1, 600, 2)]], ids=str
)
def test_a_timeline_of_many_batches_is_the_same_however_it_was_split(indices):
    rng, ramp = random.Random(1), {i: torch.tensor([[-1.0 - i % 13, i % 7]]) for i in indices}
    parts = [measure(x, i) for i, x in ramp.items()]
    def folded(some):
        total = TensorStats()
        for part in some: total = total | part
        return total
    whole, shuffled = folded(parts), rng.sample(parts, len(parts))
    stride = whole.timeline.stride
    kept = {i: (x.min().item(), x.max().item()) for i, x in sorted(ramp.items()) if i % stride == 0}
    assert list(whole.timeline.points.items()) == list(kept.items()) and len(kept) <= 256
    assert stride == 1 or sum(i % (stride // 2) == 0 for i in indices) > 256
    for cut in (1, 255, len(parts) // 2):
        assert exact(folded(shuffled[cut:]) | folded(shuffled[:cut])) == exact(whole)
    odd = folded(p for p, i in zip(parts, indices) if i % 2) | folded(p for p, i in zip(parts, indices) if not i % 2)
    assert exact(odd) == exact(whole)


def test_levels_are_the_past_in_doubling_portions():
    parts = {i: torch.full((1, 1), float(i + 1)) for i in range(20)}
    whole = merged((measure(x, i) for i, x in parts.items()), random.Random(3))
    for k in range(6):
        level = whole.up_to(k)
        assert (level.min, level.max, level.histogram.count) == (1, min(2**k, 20), min(2**k, 20))


@pytest.mark.parametrize("value", [1 + 2**-40, 1e-60, 1e300])
def test_float64_that_float32_cannot_hold(value):
    x = torch.tensor([[value, 1.0, -2.0]], dtype=torch.float64)
    stats = measure(x)
    check_against_brute_force(stats, {0: x})
    assert not is_bfloat16(x) or not finite(value)
    if not finite(value): assert stats.max == 1.0 and stats.inf == 1 and stats.first_nonfinite.position == (0, 0)


def test_zeros_have_no_sign_and_are_no_extremes():
    for width in (1, 7, 8, 17, 64):
        for zero, dtype in itertools.product((0.0, -0.0), DTYPES):
            stats = measure(torch.full((3, width), zero, dtype=dtype))
            assert not np.signbit(stats.channels).any() and stats.top == ()
            assert math.copysign(1, stats.min) == math.copysign(1, stats.max) == 1


def test_large_tensors_in_pieces_find_the_first_of_equals():
    """Bigger than any piece that is looked at, with the largest value everywhere: the first eight places, and sums over
    all."""
    x = torch.ones(600, 700)
    x[5, 3] = -2.0
    stats = measure(x, 4)
    assert [(e.position, e.channel) for e in stats.top] == [((5,), 3), *(((0,), c) for c in range(7))]
    y = torch.randn(700, 600, generator=torch.Generator().manual_seed(0))
    wide = y.double()
    assert math.isclose(measure(y).std, wide.std(correction=0).item(), rel_tol=1e-12)
    assert abs(measure(y).mean - wide.mean().item()) < 1e-12
    top = measure(y).top
    assert [abs(e.value) for e in top] == y.abs().flatten().topk(8).values.tolist()
    assert all(y[e.position][e.channel] == e.value for e in top)


def test_a_tensor_that_is_not_contiguous():
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    for view in (x.transpose(0, 1), x[::2], x.permute(2, 0, 1), x[..., 1:3]):
        assert exact(measure(view)) == exact(measure(view.contiguous()))


def test_nothing_to_see():
    empty = measure(torch.zeros(0, 4), 3)
    assert (empty.calls, empty.batches, empty.count, empty.top) == (0, 0, 0, ()) and empty.shapes == ((0, 4),)
    none = measure(torch.ones(2, 4), 3, keep=torch.zeros(2, dtype=torch.bool))
    assert none.count == none.calls == 0 and math.isnan(none.mean) and math.isnan(none.absmax)
    with pytest.raises(TypeError, match="floating point"): measure(torch.ones(2, dtype=torch.int64))
