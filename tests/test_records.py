"""A record is exact, takes one pass, leaves nothing behind, and concludes what each observer by itself concludes."""
import gc
import itertools
import math
import random
import sys
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import CONFIGS, differences, fingerprint, make_batches, make_model, offload, qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Linear, Module, Sequential
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import qcal_nb.collector
from qcal_nb.calibration import ModelBusyError, exclusive
from qcal_nb.collector import Once
from qcal_nb.conclusions import DEFAULT_ARGS, conclude_from, new_observer
from qcal_nb.experts import all_experts, tokens_per_expert
from qcal_nb.histogram import is_bfloat16
from qcal_nb.lifecycle import QuantizationMixin, QuantizationModifier, unfuse_experts
from qcal_nb.models import calibration_texts, inject_outliers, load_tiny_llama
from qcal_nb.observers.base import NonFiniteError, Registry, current_batch
from qcal_nb.observers.minmax import MinMaxObserver
from qcal_nb.pipelines import calibrate, calibration_context
from qcal_nb.records import CalibrationRecord, TensorStats, measure, record, record_equal, same_stats, unequal_parts

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OBSERVERS = Registry.registered_names()
QUIET = dict(progress=False)
NARROW = dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64)


def bits(value):
    "A tensor as something to compare bit for bit."
    return value if value is None else (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def concluded_bits(c):
    tensors = [c.low, c.high, c.scale, c.zero_point, c.global_scale, *(c.statistics[name] for name in sorted(c.statistics))]
    return [c.observer, c.reason, sorted(c.statistics), *map(bits, tensors)]


def exact(s: TensorStats):
    "All of a tensor's statistics, sums as the fractions that they are."
    return (s.sum, s.sum_squares, dict(s.levels), repr(s.first_nonfinite), s.dtypes, s.shapes, s.channels.tobytes(), s.channels.dtype, s.top,
            s.timeline, s.calls, s.batches, s.skipped, repr(s.mean), repr(s.std), s.numel)


def merged(parts, rng):
    "Parts put together in a random order and grouping."
    parts = list(parts)
    while len(parts) > 1:
        a, b = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        parts.append(a | b)
    return parts[0]


# --- statistics against brute force ---

SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 6e-8, 3.0, -3.0, 1 + 2**-40, 1e300, -1e-60, 65504.0, 3.4e38]


def tensor_of(rng, channels):
    "A small tensor of a random dtype and shape, with everything that is awkward."
    dtype, leading = rng.choice(DTYPES), rng.choice([(), (1,), (2, 3), (1, 5), (3, 1, 2)])
    kind, count = rng.choice(["normal", "normal", "constant", "few", "zeros", "special"]), math.prod(leading) * channels
    if kind == "normal": values = [rng.gauss(0, 1) * rng.choice([1, 1, 1e3]) for _ in range(count)]
    elif kind == "constant": values = [rng.choice([0.1, -7.0, 1e-3])] * count
    elif kind == "few": values = [rng.choice([-2.0, 2.0, 1.0]) for _ in range(count)]
    elif kind == "zeros": values = [rng.choice([0.0, -0.0]) for _ in range(count)]
    else: values = [rng.choice(SPECIAL) if rng.random() < 0.4 else rng.gauss(0, 1) for _ in range(count)]
    return torch.tensor(values, dtype=torch.float64).to(dtype).reshape(*leading, channels)


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
        h = stats.snapshot(k).histogram
        assert dict(zip(h.codes.tolist(), h.counts.tolist())) == Counter(code_of(v) for v, i, *_ in good if i < 2**k)
    channels = max(x.shape[-1] for x in seen.values())
    assert stats.channels.tolist() == [max((abs(v) for v, *_, c in good if c == channel), default=0.0) for channel in range(channels)]
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
    assert same_stats(whole, merged(parts, rng)) and exact(whole | TensorStats()) == exact(TensorStats() | whole) == exact(whole)


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


@pytest.mark.parametrize("indices", [range(1000), range(0, 4096, 3), range(5, 3000, 8), [0, 2**20, *range(1, 600, 2)]], ids=str)
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
        level = whole.snapshot(k)
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
            assert not np.signbit(stats.channels).any() and stats.top == () and math.copysign(1, stats.min) == math.copysign(1, stats.max) == 1


def test_large_tensors_in_pieces_find_the_first_of_equals():
    "Bigger than any piece that is looked at, with the largest value everywhere: the first eight places, and sums over all."
    x = torch.ones(600, 700)
    x[5, 3] = -2.0
    stats = measure(x, 4)
    assert [(e.position, e.channel) for e in stats.top] == [((5,), 3), *(((0,), c) for c in range(7))]
    y = torch.randn(700, 600, generator=torch.Generator().manual_seed(0))
    wide = y.double()
    assert math.isclose(measure(y).std, wide.std(correction=0).item(), rel_tol=1e-12)
    assert abs(measure(y).mean - wide.mean().item()) < 1e-12
    top = measure(y).top
    assert [abs(e.value) for e in top] == y.abs().flatten().topk(8).values.tolist() and all(y[e.position][e.channel] == e.value for e in top)


def test_a_tensor_that_is_not_contiguous():
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    for view in (x.transpose(0, 1), x[::2], x.permute(2, 0, 1), x[..., 1:3]): assert exact(measure(view)) == exact(measure(view.contiguous()))


def test_nothing_to_see():
    empty = measure(torch.zeros(0, 4), 3)
    assert (empty.calls, empty.batches, empty.count, empty.top) == (0, 0, 0, ()) and empty.shapes == ((0, 4),)
    none = measure(torch.ones(2, 4), 3, keep=torch.zeros(2, dtype=torch.bool))
    assert none.count == none.calls == 0 and math.isnan(none.mean) and math.isnan(none.absmax)
    with pytest.raises(TypeError, match="floating point"): measure(torch.ones(2, dtype=torch.int64))


# --- whole records, in parts ---

@pytest.fixture(scope="module")
def tiny(): return load_tiny_llama()


def mixture(seed=0):
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**NARROW, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)).eval()


@pytest.fixture(scope="module")
def batches_and_whole():
    "Batches of unequal shape with their record; every way to split them has to lead here."
    model = mixture()
    data = [*make_batches(2), *make_batches(3, shape=(1, 5), seed=2), *make_batches(1, shape=(3, 9), seed=3)]
    options = dict(observers=["static_minmax", "percentile", "mse", "minmax", "imatrix_mse"], base_names=["input", "weight", "output"], **QUIET)
    return model, data, options, record(model, data, **options)


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_a_record_add_up(batches_and_whole, seed):
    model, data, options, whole = batches_and_whole
    rng = random.Random(seed)
    owner = [rng.randrange(3) for _ in data]
    parts = []
    for p in range(3):
        mine = [i for i in range(len(data)) if owner[i] == p]
        rng.shuffle(mine)
        if mine: parts.append(record(model, [data[i] for i in mine], batch_indices=mine, **options))
    found = merged(parts, rng)
    assert unequal_parts(found, whole) == [] and record_equal(found, whole)
    for key in whole.tensors: assert exact(found[key]) == exact(whole[key]), key
    assert found.expert_tokens == whole.expert_tokens and found.tokens == whole.tokens == sum(b["input_ids"].numel() for b in data)
    lasting = [k for k, c in whole.conclusions.items() if k[2] in ("static_minmax", "percentile")]
    assert lasting and all(concluded_bits(found.conclusions[k]) == concluded_bits(whole.conclusions[k]) for k in lasting)


def test_moving_averages_do_not_merge_and_say_so(batches_and_whole):
    model, data, options, whole = batches_and_whole
    a, b = record(model, data[:2], **options), record(model, data[2:], batch_indices=range(2, len(data)), **options)
    both = a | b
    for name, words in (("minmax", "depends on the order"), ("mse", "depends on the order")):
        moving = [c for k, c in both.conclusions.items() if k[1:] == ("input", name)]
        assert moving and all(words in c.reason and c.scale is None and c.low is None for c in moving)
        assert all(concluded_bits(both.conclusions[k])[3:] == concluded_bits(c)[3:] for k, c in a.conclusions.items() if k[1:] == ("weight", name))
    weighed = [c for k, c in both.conclusions.items() if k[1:] == ("weight", "imatrix_mse")]
    assert weighed and all("weighs the weight's columns" in c.reason and c.scale is None for c in weighed)
    third = record(model, data[:1], batch_indices=[40], **options)
    assert record_equal((a | b) | third, a | (third | b))
    assert all(c.scale is None for k, c in (both | third).conclusions.items() if k[1:] == ("input", "minmax"))


def test_a_part_that_saw_nothing_finite_leaves_the_other_its_conclusion():
    torch.manual_seed(0)
    model, good, bad = Sequential(Linear(16, 16)), torch.randn(4, 16), torch.full((4, 16), math.nan)
    for scheme, observers in (("NVFP4", ["static_minmax"]), (None, ["minmax", "mse", "static_minmax"])):
        for policy in ("skip", "record"):
            options = dict(scheme=scheme, observers=observers, nonfinite=policy, base_names="input", **QUIET)
            parts = record(model, [bad], **options), record(model, [good], batch_indices=[1], **options)
            whole = record(model, [bad, good], **options)
            for name in observers:
                key = ("0", "input", name)
                assert parts[0].conclusions[key].reason == "nothing finite was seen"
                assert concluded_bits((parts[0] | parts[1]).conclusions[key]) == concluded_bits(whole.conclusions[key]), (name, policy)
            assert record_equal(parts[1] | parts[0], whole)


def test_what_cannot_be_merged_is_refused_with_words(batches_and_whole):
    model, data, options, _ = batches_and_whole
    one = record(model, data[:1], **options)
    def refused(other, words):
        for pair in ((one, other), (other, one)):
            with pytest.raises(ValueError, match=words): _ = pair[0] | pair[1]
    refused(record(model, data[1:2], **options), "batch 0 is in both records, so it would count twice; .*batch_indices")
    refused(record(make_model("llama_gqa"), data[:1], batch_indices=[1], **options), "two runs: model is '.*' in one and '.*' in the other")
    refused(record(model, data[:1], scheme="FP8", batch_indices=[1], **options), "two runs: config is")
    refused(record(mixture(seed=1), data[:1], batch_indices=[1], **options), "its weight is another one in the other record")
    class Other(Linear): pass
    mixed = Sequential(Linear(4, 4)), Sequential(Other(4, 4))
    a, b = (record(m, [torch.ones(1, 4)], batch_indices=[i], base_names="input", **QUIET) for i, m in enumerate(mixed))
    with pytest.raises(ValueError, match="0 are of other classes"): _ = a | b
    with pytest.raises(TypeError): _ = one | 3
    with pytest.raises(TypeError, match="must be a CalibrationRecord, got int"): record_equal(one, 3)


def test_what_record_equal_sees(batches_and_whole):
    model, data, options, whole = batches_and_whole
    assert record_equal(whole, record(model, data, **options))
    assert any("statistics of" in part for part in unequal_parts(whole, record(model, data[::-1], **options)))  # another batch 0
    assert "experts" in unequal_parts(whole, record(model, data[:-1], **options))
    assert any(p.startswith("conclusion of") for p in unequal_parts(whole, record(model, data, **options | dict(observers=["static_minmax"]))))
    assert "config" in unequal_parts(whole, record(model, data, scheme="FP8", **options))


# --- one pass ---

@pytest.fixture
def looks(monkeypatch):
    "How often each thing was done: tensors measured, and observers shown something."
    counts = Counter()
    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)
        return counted
    monkeypatch.setattr(qcal_nb.collector, "measure", counting("measure", qcal_nb.collector.measure))
    for read in ("_read_once", "_read"): monkeypatch.setattr(qcal_nb.tensor_stats, read, counting(read, getattr(qcal_nb.tensor_stats, read)))
    monkeypatch.setattr(MinMaxObserver, "update_statistics_from_observed", counting("minmax", MinMaxObserver.update_statistics_from_observed))
    monkeypatch.setattr(qcal_nb.observers.histogram, "bucket_counts", counting("histogram", qcal_nb.observers.histogram.bucket_counts))
    return counts


def forwards(model, counts):
    return model.register_forward_pre_hook(lambda *_: counts.update(["forward"]))


@pytest.mark.parametrize("observers", [["static_minmax"], ["static_minmax", "minmax", "percentile", "entropy", "histogram_mse", "memoryless_minmax"]])
def test_one_pass_for_any_number_of_observers(looks, observers):
    "Two layers, three batches: q, k, v read one tensor, gate and up another, o and down their own; and fourteen weights."
    model = make_model("llama_gqa")
    handle = forwards(model, looks)
    run = record(model, make_batches(3), observers=observers, **QUIET)
    handle.remove()
    tensors = 2 * 4 * 3 + 14
    assert (looks["forward"], looks["measure"], looks["_read_once"], looks["_read"], looks["histogram"]) == (3, tensors, tensors, 0, 0)
    assert looks["minmax"] == (2 * 4 * 3 if "minmax" in observers else 0)  # a weight's follows from what was measured
    for layer in ("model.layers.0", "model.layers.1"):
        q, k, v = (run[f"{layer}.self_attn.{n}_proj", "input"] for n in "qkv")
        gate, up = (run[f"{layer}.mlp.{n}_proj", "input"] for n in ("gate", "up"))
        assert q is k is v and gate is up and q is not gate and q is not run[f"{layer}.self_attn.o_proj", "input"]
        if "minmax" not in observers: continue
        assert len({id(run.conclusions[f"{layer}.self_attn.{n}_proj", "input", "minmax"]) for n in "qkv"}) == 1


def test_experts_share_what_they_are_all_shown(looks):
    "A layer of a mixture: q/k/v, o, all gates and ups of all experts, and four downs."
    model = make_model("mixtral")
    run = record(model, make_batches(2), observers=["minmax"], base_names="input", **QUIET)
    assert looks["measure"] == looks["minmax"] == 2 * 2 * (2 + 1 + 4)
    assert len({id(s) for (m, _), s in run.tensors.items() if ".experts." in m and not m.endswith("down_proj")}) == 2
    assert all(s.count == 2 * 32 * 64 for (m, _), s in run.tensors.items() if m.endswith("gate_proj"))


def test_a_module_that_runs_three_times_in_a_batch(looks):
    "ALBERT has one layer and runs it three times."
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=128, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    model, data = AlbertModel(config).eval(), make_batches(2)
    caught = {0: [], 1: []}
    query = next(m for n, m in model.named_modules() if n.endswith("query"))
    handle = query.register_forward_pre_hook(lambda _, args: caught[current_batch.get()].append(args[0].detach()))
    run = record(model, data, observers=["minmax", "static_minmax"], base_names="input", **QUIET)
    handle.remove()
    name = next(m for m, _ in run.tensors if m.endswith("query"))
    stats = run[name, "input"]
    assert (stats.calls, stats.batches) == (6, 2) and [len(c) for c in caught.values()] == [3, 3]
    wanted = merged((measure(x, i) for i, xs in caught.items() for x in xs), random.Random(0))
    assert stats.histogram == wanted.histogram and stats.top == wanted.top and stats.timeline == wanted.timeline and stats.mean == wanted.mean
    alone = new_observer("minmax", "input", DEFAULT_ARGS)
    for xs in caught.values():
        for x in xs: alone(x)
    assert torch.equal(run.conclusions[name, "input", "minmax"].scale, alone.get_qparams()["scale"])
    assert run.conclusions[name, "input", "static_minmax"].counts.observations == 6


def test_a_recycled_address_is_another_tensor():
    "Thousands of tensors of one size come and go; the allocator gives the same places again and again."
    for size in (1, 2, 4):
        once, places = Once(size), []
        for i in range(400):
            x = torch.full((1000,), float(i))
            places.append(x.data_ptr())
            assert once(x, "value", lambda x=x: x[7].item()) == i
            del x
        assert len(set(places)) < 100


class Alters(Module):
    "Two Linears; what the first one read is changed in place, or freed and its place taken, before the second one reads."

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.how = Linear(64, 64), Linear(64, 64), how

    def forward(self, x):
        t = x * 1.0
        self.a(t)
        if self.how == "in place": t.add_(1)
        elif self.how == "freed":
            del t
            gc.collect()
            t = x * 3.0
        elif self.how == "view": t = t.flatten(0, 1)
        elif self.how == "part": t = t[..., :64][:1]
        return self.b(t)


@pytest.mark.parametrize("how, same", [("nothing", True), ("in place", False), ("freed", False), ("part", False), ("view", False)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_only_the_same_state_of_a_tensor_is_taken_for_the_same(how, same, mode):
    model, x = Alters(how), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with mode(): run = record(model, [x], observers=["minmax"], base_names="input", **QUIET)
    right = {"nothing": x, "in place": x + 1, "freed": x * 3.0, "view": x.flatten(0, 1), "part": x[:1]}[how]
    assert exact(run["a", "input"]) == exact(measure(x)) and exact(run["b", "input"]) == exact(measure(right))
    if mode is torch.no_grad: assert (run["a", "input"] is run["b", "input"]) == same
    alone = new_observer("minmax", "input", DEFAULT_ARGS)(right)
    assert torch.equal(run.conclusions["b", "input", "minmax"].scale, alone.get_qparams()["scale"])


def test_outputs_and_the_head(looks):
    model, data, caught = make_model("llama_gqa"), make_batches(2), {}
    def catch(name): return lambda _m, _a, out: caught.setdefault(name, []).append(out.detach().clone())
    handles = [m.register_forward_hook(catch(n)) for n, m in model.named_modules() if isinstance(m, Linear)]
    run = record(model, data, base_names=["output", "lm_head_output"], **QUIET)
    for h in handles: h.remove()
    assert set(run.tensors) == {(n, "output") for n in caught} and ("lm_head", "output") in run.tensors
    for name, outs in caught.items(): assert exact(run[name, "output"]) == exact(measure(outs[0], 0) | measure(outs[1], 1))
    assert ("lm_head", "output") not in record(model, data[:1], base_names="output", **QUIET).tensors
    assert ("lm_head", "input") in record(model, data[:1], scheme=QuantizationMixin(scheme="FP8"), **QUIET).tensors


# --- nothing stays on the model ---

class Broken(Exception): pass


def failing(model, where, error, after=2):
    "Raise in the middle of a forward pass: the `after`-th time that a layer ends."
    seen = itertools.count(1)
    def hook(*_):
        if next(seen) == after: raise error
    return where.register_forward_hook(hook)


def test_nothing_is_left_by_success(batches_and_whole):
    for name, options in itertools.product(("llama_gqa", "mixtral", "gemma2"), ({}, dict(scheme="NVFP4", observers=["imatrix_mse", "mse"]))):
        model = make_model(name)
        before = fingerprint(model)
        record(model, make_batches(1), **options, **QUIET)
        assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("name", ["llama_gqa", "mixtral"])
@pytest.mark.parametrize("what", ["bad data", "late bad data", "forward", "interrupt", "raise", "mask", "indices", "strange error"])
def test_nothing_is_left_by_what_fails(name, what):
    model, data = make_model(name), make_batches(3)
    options = dict(observers=["minmax", "imatrix_mse"], **QUIET)
    handle, layer = None, model.model.layers[1].self_attn.o_proj
    if what == "forward": handle = failing(model, layer, Broken("in the middle"))
    if what == "interrupt": handle = failing(model, layer, KeyboardInterrupt())
    if what == "strange error": handle = failing(model, layer, SystemExit(3))
    if what == "raise":
        with torch.no_grad(): model.model.embed_tokens.weight[int(data[1]["input_ids"][1, 3])] = math.nan
        options |= dict(nonfinite="raise", base_names="input")
    if what == "bad data": data = ["a text without a tokenizer"]
    if what == "late bad data": data = [data[0], "a text without a tokenizer"]
    if what == "mask": options |= dict(mask=lambda batch: batch["attention_mask"])
    if what == "indices": options |= dict(batch_indices=[0, 1])
    before = fingerprint(model)
    expected = {"forward": Broken, "interrupt": None, "raise": NonFiniteError, "strange error": SystemExit}.get(what, ValueError)
    if expected is None: assert record(model, data, **options).batches == 1
    else:
        with pytest.raises(expected): record(model, data, **options)
    assert differences(before, fingerprint(model)) == []
    if handle: handle.remove()
    if what == "raise": return
    assert record(model, make_batches(1), **QUIET).batches == 1  # and nobody holds it


def test_a_nan_is_refused_with_its_name_and_place():
    model, x = Sequential(Linear(4, 4)), torch.ones(2, 3, 4)
    x[1, 2, 3] = math.inf
    with pytest.raises(NonFiniteError, match=r"0, input: 1 non-finite value, the first \(inf\) at position \(1, 2, 3\) of batch 1"):
        record(model, [torch.ones(2, 3, 4), x], nonfinite="raise", **QUIET)
    with torch.no_grad(): model[0].weight[2, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"0, weight: .* at position \(2, 1\)"): record(model, [x], nonfinite="raise", **QUIET)


OPTIONS = dict(observers=["static_minmax", "minmax", "mse", "percentile", "imatrix_mse"], scheme="FP8", **QUIET)


@pytest.mark.parametrize("name", ["llama_gqa", "mixtral"])
@pytest.mark.parametrize("finished", [0, 1, 2])
def test_an_interrupt_in_the_middle_of_a_batch(name, finished):
    "What is left is the record of the batches that were finished, conclusions and routed tokens included."
    model, data = make_model(name), make_batches(3)
    handle = failing(model, model.model.layers[1].self_attn.o_proj, KeyboardInterrupt(), after=finished + 1)
    some = record(model, data, **OPTIONS)
    handle.remove()
    assert some.batches == finished
    if not finished:
        assert some.tokens == 0 and all(s.count == 0 for (_, b), s in some.tensors.items() if b == "input")
        return
    right = record(model, data[:finished], **OPTIONS)
    assert unequal_parts(some, right) == [] and some.expert_tokens == right.expert_tokens
    for key, c in right.conclusions.items(): assert concluded_bits(some.conclusions[key]) == concluded_bits(c), key


def test_an_interrupt_of_the_data():
    model, data = make_model("llama_gqa"), make_batches(3)
    def impatient(n):
        yield from data[:n]
        raise KeyboardInterrupt
    assert record_equal(record(model, impatient(2), **OPTIONS), record(model, data[:2], **OPTIONS))
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt): record(model, impatient(0), **OPTIONS)  # there is nothing to return
    assert differences(before, fingerprint(model)) == []


def test_an_interrupt_at_any_line():
    "Between looking, adding and keeping there is no line where statistics know more batches than conclusions do."
    torch.manual_seed(0)
    model, data = Sequential(Linear(8, 8), Linear(8, 8)), [torch.randn(2, 8) for _ in range(3)]
    options = dict(observers=["minmax", "imatrix_mse"], scheme=dict(weights=dict(num_bits=8, strategy="channel")), progress=False)
    right = {n: record(model, data[:n], **options) for n in (1, 2, 3)}
    files, lines = ("collector.py", "calibration_record.py", "tensor_stats.py"), [0]
    def run(stop):
        lines[0] = 0
        def local(frame, event, _):
            if event == "line" and inside(frame):
                lines[0] += 1
                if lines[0] == stop: raise KeyboardInterrupt
            return local
        def inside(frame):
            back = frame
            while back is not None:
                if back.f_code.co_name == "one_pass": return True
                back = back.f_back
            return False
        def trace(frame, event, _):
            watched = frame.f_code.co_filename.endswith(files) and frame.f_code.co_name not in ("_attached", "_hooks", "attached")
            return local if watched and inside(frame) else None
        sys.settrace(trace)
        try: return record(model, data, **options)
        finally: sys.settrace(None)
    assert run(-1).batches == 3 and lines[0] > 500
    before, counts = fingerprint(model), Counter()
    for stop in random.Random(0).sample(range(1, lines[0]), 70):
        found = run(stop)
        counts[found.batches] += 1
        assert differences(before, fingerprint(model)) == []
        if found.batches:
            assert unequal_parts(found, right[found.batches]) == []
            for key, c in right[found.batches].conclusions.items(): assert concluded_bits(found.conclusions[key]) == concluded_bits(c), (stop, key)
    assert min(counts[n] for n in (0, 1, 2)) > 5


def test_a_model_whose_experts_are_apart_keeps_its_own_count():
    model, data = make_model("mixtral"), make_batches(3)
    fresh = record(model, data, **QUIET)
    unfuse_experts(model)
    with torch.no_grad(), all_experts(model): model(**data[0])
    assert sum(row.tokens for row in tokens_per_expert(model)) == 2 * 2 * 32
    assert all(record(model, data, **QUIET).expert_tokens == fresh.expert_tokens for _ in range(2))
    before = fingerprint(model)
    record(model, data, **QUIET)
    assert differences(before, fingerprint(model)) == []
    assert sum(fresh.expert_tokens.values()) == 2 * 2 * 96  # two layers, two experts a token


def test_a_held_model_is_not_recorded():
    model = make_model("llama_gqa")
    with exclusive(model, "somebody"), torch.no_grad():
        import threading
        found = []
        def work():
            try: record(model, make_batches(1), **QUIET)
            except ModelBusyError as error: found.append(str(error))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(found) == 1 and "somebody" in found[0]


def test_a_calibrating_model_hears_nothing_of_a_recording():
    "Observers that are on the model already go on knowing what they knew."
    from qcal_nb.calibration import observers_in
    from qcal_nb.lifecycle import State
    model, modifier = make_model("llama_gqa"), QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"])
    modifier.on_initialize(State(model))
    modifier.on_start(State(model))
    with torch.no_grad(): model(**make_batches(1)[0])
    before = [o.counts for o in observers_in(model)]
    record(model, make_batches(2, seed=5), **QUIET)
    assert [o.counts for o in observers_in(model)] == before and before


# --- conclusions: as each observer alone ---

SCHEMES = dict(FP8="FP8", INT8_STATIC="INT8_STATIC", W8A8="W8A8", NVFP4="NVFP4", MXFP4="MXFP4",
               W4A16=dict(weights=dict(num_bits=4, strategy="group", group_size=32, symmetric=False)))
STATIC_INPUTS = dict(FP8=("scale", "zero_point"), INT8_STATIC=("scale", "zero_point"), NVFP4=("global_scale",))
HISTOGRAMS = {"entropy", "histogram_mse", "percentile"}


def one_layer(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**NARROW, num_key_value_heads=1)).to(dtype).eval()


@pytest.mark.filterwarnings("ignore:.*(observer|imatrix):UserWarning")
@pytest.mark.parametrize("scheme, dtype", [*((s, torch.float32) for s in SCHEMES), ("FP8", torch.bfloat16), ("NVFP4", torch.bfloat16)])
def test_all_at_once_is_each_alone_in_a_calibration(scheme, dtype):
    data, compared = make_batches(3), Counter()
    run = record(one_layer(dtype), data, scheme=QuantizationMixin(scheme=SCHEMES[scheme], ignore=["lm_head"]), observers=OBSERVERS, **QUIET)
    for observer, part in itertools.product(OBSERVERS, ("weight", "input")):
        found = {k[0]: c for k, c in run.conclusions.items() if k[1:] == (part, observer)}
        assert len(found) == 7
        if part == "input" and "imatrix" in observer: impossible = "it weighs the columns of a weight"
        else:
            fine = scheme == "FP8" if part == "weight" else scheme != "NVFP4"
            impossible = "keeps one histogram per tensor" if observer in HISTOGRAMS and not fine else ""
        assert all(bool(c.reason) == bool(impossible) and impossible in c.reason for c in found.values()), (observer, part)
        if impossible or part == "input" and scheme not in STATIC_INPUTS: continue
        model = one_layer(dtype)
        calibrate(model, data, QuantizationModifier(scheme=SCHEMES[scheme], ignore=["lm_head"], **{f"{part}_observer": observer}), **QUIET)
        for name, value in qparams(model).items():
            module, _, field = name.rpartition(f".{part}_")
            if not module or part == "input" and field not in STATIC_INPUTS[scheme]: continue
            ours = getattr(found[module], field)
            assert bits(ours.to(value.dtype)) == bits(value), (observer, name)
            compared[observer] += 1
    assert set(compared) == set(OBSERVERS) - (HISTOGRAMS if scheme in ("NVFP4", "MXFP4", "W4A16", "W8A8") else set())


def test_fused_weights_share_one_global_scale_of_each_observer():
    run = record(one_layer(), make_batches(1), scheme="NVFP4", observers=["static_minmax", "mse", "imatrix_mse"], **QUIET)
    for name in run.observers:
        q, k, v, o = (run.conclusions[f"model.layers.0.self_attn.{n}_proj", "weight", name].global_scale for n in "qkvo")
        assert torch.equal(q, k) and torch.equal(k, v) and not torch.equal(q, o)


@pytest.mark.parametrize("policy", ["record", "skip"])
@pytest.mark.parametrize("scheme", ["INT8_STATIC", "NVFP4"])
def test_with_nan_in_some_batches_too(policy, scheme):
    "A NaN in the second batch, an infinity in the fourth; both run on through the layers."
    def fresh():
        torch.manual_seed(0)
        return Sequential(Linear(32, 32), torch.nn.ReLU(), Linear(32, 32))
    data = [torch.randn(4, 32, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    data[1][2, 3], data[3][0, 0] = math.nan, math.inf
    wanted = [o for o in OBSERVERS if "imatrix" not in o and not (scheme == "NVFP4" and o in HISTOGRAMS)]
    options = dict(scheme=scheme, nonfinite=policy, **QUIET)
    run = record(fresh(), data, observers=[*wanted, "imatrix_mse"], **options)
    field = "global_scale" if scheme == "NVFP4" else "scale"
    for observer, part in [*((o, "input") for o in wanted), ("imatrix_mse", "weight"), ("mse", "weight")]:
        model = fresh()
        calibrate(model, data, QuantizationModifier(scheme=scheme, **{f"{part}_observer": observer}), nonfinite=policy, **QUIET)
        for layer in "02":
            right, found = qparams(model)[f"{layer}.{part}_{field}"], run.conclusions[layer, part, observer]
            assert bits(getattr(found, field)) == bits(right), (observer, layer, part)
    stats = run["0", "input"]
    assert (stats.nan, stats.inf, stats.skipped, stats.batches) == (1, 1, 0 if policy == "record" else 2, 5 if policy == "record" else 3)
    assert stats.first_nonfinite.batch == 1 and stats.first_nonfinite.position == (2, 3)
    right = [x for i, x in enumerate(data) if policy == "record" or i not in (1, 3)]
    assert stats.count == sum(int(x.isfinite().sum()) for x in right)
    assert set(stats.timeline.points) == ({0, 1, 2, 3, 4} if policy == "record" else {0, 2, 4})


@pytest.mark.parametrize("policy", ["record", "skip"])
def test_a_weight_with_a_nan(policy):
    model = Sequential(Linear(8, 8))
    with torch.no_grad(): model[0].weight[1, 2] = math.nan
    run = record(model, [torch.ones(2, 8)], nonfinite=policy, scheme="FP8", observers=["static_minmax", "mse", "imatrix_mse"], **QUIET)
    for name in run.observers:
        alone = new_observer(name, "weight", run.conclusions["0", "weight", name].args)
        alone.nonfinite = policy
        if hasattr(alone, "hear"): alone.hear(torch.ones(2, 8))
        alone(model[0].weight.detach())
        found = run.conclusions["0", "weight", name]
        if alone.has_statistics: assert bits(found.scale) == bits(alone.get_qparams()["scale"]), name
        else: assert found.reason == "nothing finite was seen" and found.scale is None, name
    assert run["0", "weight"].nan == 1 and run["0", "weight"].count == (63 if policy == "record" else 0)


def test_an_observer_that_refuses_in_the_end_does_not_cost_the_record():
    "`strict` importance for a module that never ran."
    class Idle(Module):
        def __init__(self):
            super().__init__()
            self.runs, self.idle = Linear(8, 8), Linear(8, 8)
        def forward(self, x): return self.runs(x)
    model = Idle()
    scheme, strict = dict(weights=dict(num_bits=8, strategy="channel")), ("imatrix_mse", {"strict": True})
    run = record(model, [torch.ones(2, 8)], scheme=scheme, observers=[strict], **QUIET)
    label = "imatrix_mse(strict=True)"
    assert run.conclusions["runs", "weight", label].scale is not None
    assert "no data reached the module" in run.conclusions["idle", "weight", label].reason
    assert run["idle", "input"].count == 0 and run.conclusions["idle", "input", label].scale is None


def test_arguments_of_an_observer_count(tiny):
    asked = ["percentile", ("percentile", {"percentile": 99.0}), ("minmax", {"averaging_constant": 1.0}), "minmax"]
    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    run = record(Sequential(Linear(16, 16)), data, observers=asked, base_names="input", **QUIET)
    assert run.observers == ["percentile", "percentile(percentile=99.0)", "minmax(averaging_constant=1.0)", "minmax"]
    for one, label in zip(asked, run.observers):
        alone = new_observer(one, "input", DEFAULT_ARGS)
        for x in data: alone(x)
        assert bits(run.conclusions["0", "input", label].scale) == bits(alone.get_qparams()["scale"])
    assert len({run.conclusions["0", "input", label].scale.item() for label in run.observers}) == 4


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_statistics_alone_conclude_what_the_observer_would(seed):
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES[:3])
    data = [x for i in range(3) if (x := tensor_of(rng, 8).to(dtype).nan_to_num(0.0, 9.0, -9.0).clamp(-1e4, 1e4)).numel()]
    stats = merged([measure(x, i) for i, x in enumerate(data)], rng)
    for name in ("static_minmax", "percentile", "entropy", "histogram_mse"):
        alone = new_observer(name, "input", DEFAULT_ARGS)
        for x in data: alone(x)
        assert bits(conclude_from(stats, "input", name).scale) == bits(alone.get_qparams()["scale"]), name


# --- masks ---

@pytest.mark.parametrize("name", ["llama_gqa", "opt", "gpt_neox", "gemma2", "mixtral"])
def test_what_is_masked_does_not_count(name):
    "Against every Linear's inputs, caught and cut by hand. OPT flattens what its MLP is fed, experts are shown all tokens in a row."
    model, data, caught = make_model(name), make_batches(3), {}
    for b in data: b["attention_mask"][1, 12:] = 0
    mask = {5, 9, int(data[0]["input_ids"][0, 0])}
    for given_mask, keep in ((mask, lambda b: ~torch.isin(b["input_ids"], torch.tensor(sorted(mask)))), (lambda b: b["attention_mask"].bool(),) * 2):
        caught.clear()
        def catch(n): return lambda _, args: caught.setdefault(n, []).append((current_batch.get(), args[0].detach()))
        handles = [m.register_forward_pre_hook(catch(n)) for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"]
        run = record(model, data, mask=given_mask, base_names=["input", "output"], observers=["minmax", "static_minmax"], **QUIET)
        for h in handles: h.remove()
        kept = [keep(b) for b in data]
        assert run.tokens == sum(int(k.sum()) for k in kept)
        assert all(s.count == run.tokens * s.shapes[0][-1] for s in run.tensors.values())
        for n, seen in caught.items():
            rows = [x.reshape(-1, x.shape[-1])[kept[i].reshape(-1)] for i, x in seen if i is not None]
            stats = run[n, "input"]
            assert stats.min == min(r.min().item() for r in rows) and stats.max == max(r.max().item() for r in rows)
            assert len(stats.top) == 8 and all(kept[e.batch][e.position] for e in stats.top)
            alone = new_observer("minmax", "input", DEFAULT_ARGS)
            for r in rows: alone(r)
            assert bits(run.conclusions[n, "input", "minmax"].scale) == bits(alone.get_qparams()["scale"])


def test_padding_does_not_count(tiny):
    "Texts padded to one length with a mask: as many values as one by one, and the same extremes but for rounding."
    model, tokenizer = tiny
    texts = sorted(calibration_texts()[:40], key=len)[::13]
    assert len({len(tokenizer(t).input_ids) for t in texts}) == 4
    options = dict(tokenizer=tokenizer, **QUIET)
    with pytest.warns(UserWarning, match="the padding counts like any token.*leaves it out"): careless = record(model, texts, batch_size=4, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded = record(model, texts, batch_size=4, mask=lambda b: b["attention_mask"].bool(), **options)
    single = record(model, texts, **options)
    assert padded.tokens == single.tokens < careless.tokens
    for key, stats in single.tensors.items():
        assert padded[key].count == stats.count and math.isclose(padded[key].max, stats.max, rel_tol=1e-4), key


@pytest.mark.parametrize("mask, error, words", [
    ("bos", TypeError, "mask must be token ids"), (3, TypeError, "mask must be token ids"), ([1.5], TypeError, "mask must be token ids"),
    ([True, False], TypeError, "mask must be token ids"), (torch.tensor([[True]]), TypeError, "mask must be token ids"),
    ([None], TypeError, "mask must be"),
    (lambda b: b["attention_mask"], ValueError, "mask must return a bool tensor of the shape of input_ids, \\(2, 16\\); it returned torch.int64"),
    (lambda b: b["attention_mask"].bool()[0], ValueError, "it returned torch.bool \\(16,\\)"), (lambda b: True, ValueError, "it returned bool"),
])
def test_masks_that_make_no_sense(mask, error, words):
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(error, match=words): record(model, make_batches(1), mask=mask, **QUIET)
    assert differences(before, fingerprint(model)) == []


def test_token_ids_of_any_kind_make_a_mask():
    model, data = make_model("llama_gqa"), make_batches(2)
    masks = [3, 5], {5, 3}, torch.tensor([3, 5]), np.array([3, 5]), range(3, 6, 2)
    runs = [record(model, data, mask=m, base_names="input", **QUIET) for m in masks]
    assert all(record_equal(r, runs[0]) for r in runs) and runs[0].tokens < 64
    assert record(model, data, mask=[], base_names="input", **QUIET).tokens == 64
    nothing = record(model, data, mask=range(128), **QUIET)
    assert nothing.tokens == 0 and all(s.count == 0 for (_, b), s in nothing.tensors.items() if b == "input")


def test_a_mask_that_does_not_fit_is_refused_by_name():
    model = make_model("bert")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"mask: the input of pooler.dense has shape \(2, 64\).*leave the module out"):
        record(model, make_batches(1), mask=[5], **QUIET)
    assert differences(before, fingerprint(model)) == []
    run = record(model, make_batches(1), mask=[5], scheme=QuantizationMixin(scheme="INT8_STATIC", ignore=["pooler.dense"]), **QUIET)
    assert run.tokens == int((make_batches(1)[0]["input_ids"] != 5).sum()) and ("pooler.dense", "input") not in run.tensors
    with pytest.raises(ValueError, match="mask needs token ids"): record(Sequential(Linear(4, 4)), [torch.ones(2, 4)], mask=[5], **QUIET)


# --- other architectures ---

def encoder_decoders():
    small = dict(vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                 encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    torch.manual_seed(0)
    ids = make_batches(2)
    both = [dict(b, decoder_input_ids=b["input_ids"].flip(1)) for b in ids]
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=128, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0))
    yield "t5", t5, both
    yield "bart", BartForConditionalGeneration(BartConfig(**small, max_position_embeddings=32)), both
    sounds = [dict(input_features=torch.randn(2, 8, 16), decoder_input_ids=b["input_ids"][:, :8]) for b in ids]
    yield "whisper", WhisperForConditionalGeneration(WhisperConfig(**small, num_mel_bins=8, max_source_positions=8, max_target_positions=16)), sounds


def test_encoder_decoders(tiny):
    "They are recorded; a mask, or the token at a place, would mean two things at once: refused, and not told."
    for name, model, data in encoder_decoders():
        model.eval()
        before = fingerprint(model)
        run = record(model, data, tokenizer=tiny[1], base_names=["input", "output", "lm_head_output"], **QUIET)
        assert run.batches == 2 and all(s.count for s in run.tensors.values()), name
        assert any("decoder" in m for m, _ in run.tensors) and not run.has_text
        with pytest.raises(ValueError, match=f"mask: {type(model).__name__} reads two sequences"): record(model, data, mask=[5], **QUIET)
        assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"gpt2"}))
def test_any_language_model(name):
    "Inputs of every Linear but the head are what plain hooks see."
    model, data, caught = make_model(name), make_batches(2), {}
    if name != "mixtral":
        def catch(n): return lambda _, args: caught.setdefault(n, []).append(args[0].detach().clone())
        handles = [m.register_forward_pre_hook(catch(n)) for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"]
        with calibration_context(model):
            for b in data: model(**b)
        for h in handles: h.remove()
    run = record(model, data, observers=["minmax"], **QUIET)
    assert run.batches == 2 and run.tokens == 64 and len(run) > 10
    for n, seen in caught.items():
        leading = (2, 16) if len(seen[0]) == 32 else None  # OPT flattens; positions are those of the tokens all the same
        assert exact(run[n, "input"]) == exact(measure(seen[0], 0, leading=leading) | measure(seen[1], 1, leading=leading)), n
    assert {m for m, b in run.tensors if b == "input"} >= set(caught)


def test_images_and_plain_modules():
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4)).eval()
    run = record(vit, [dict(pixel_values=torch.randn(2, 3, 16, 16)) for _ in range(2)], **QUIET)
    assert run.batches == 2 and run.tokens == 4 and any(s.shapes == ((2, 17, 32),) for s in run.tensors.values())
    plain = Sequential(Linear(4, 8), torch.nn.ReLU(), Linear(8, 2))
    run = record(plain, [torch.randn(3, 4), torch.randn(5, 4)], base_names=["input", "weight", "output"], **QUIET)
    assert run["0", "input"].shapes == ((3, 4), (5, 4)) and run["2", "output"].count == 16 and run["0", "input"].timeline.points.keys() == {0, 1}
    assert run["2", "input"].min == 0 and run["0", "weight"].numel == 32


def test_a_model_with_nothing_to_record_is_refused():
    for model in (Sequential(torch.nn.ReLU()), make_model("gpt2")):
        before = fingerprint(model)
        with pytest.raises(ValueError, match=f"there is nothing to record: {type(model).__name__} has no Linear"):
            record(model, make_batches(1), **QUIET)
        assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model(kind, tmp_path):
    here = record(make_model("llama_gqa"), make_batches(2), **OPTIONS)
    model = offload(make_model("llama_gqa"), kind, tmp_path/"weights")
    before = {n: id(m._parameters) for n, m in model.named_modules()}
    there = record(model, make_batches(2), **OPTIONS)
    assert unequal_parts(here, there) == []
    assert {n: id(m._parameters) for n, m in model.named_modules()} == before and not any(m._forward_pre_hooks for m in model.modules())


def test_tied_embeddings_as_a_target():
    model = make_model("llama_tied")
    before = fingerprint(model)
    scheme = QuantizationMixin(config_groups={"g": dict(targets=["Linear", "Embedding"], weights=dict(num_bits=8, strategy="channel"))})
    run = record(model, make_batches(1), scheme=scheme, base_names=["input", "weight", "output"], **QUIET)
    assert ("model.embed_tokens", "weight") in run.tensors and ("model.embed_tokens", "input") not in run.tensors
    weight = model.model.embed_tokens.weight.detach()
    assert exact(run["model.embed_tokens", "weight"]) == exact(measure(weight, None)) and run["model.embed_tokens", "weight"].batches == 0
    assert run["lm_head", "weight"].histogram == run["model.embed_tokens", "weight"].histogram
    assert differences(before, fingerprint(model)) == []


def test_weights_alone_need_no_data():
    model = make_model("llama_gqa")
    run = record(model, None, base_names="weight", observers=["mse", "percentile"], **QUIET)
    assert run.batches == run.tokens == 0 and len(run) == 14 and all(c.scale is not None for c in run.conclusions.values())
    assert all(s.calls == 1 and s.batches == 0 and all(e.batch == -1 for e in s.top) for s in run.tensors.values())


# --- the largest values ---

def test_the_largest_values_stand_where_they_are_said_to_stand(tiny):
    "Every input of the embedded model, outliers injected, against brute force; and the token is that of the place."
    model, tokenizer = load_tiny_llama()
    channels = inject_outliers(model)["model.layers.1.input_layernorm"]
    texts, caught = calibration_texts()[:6], {}
    def catch(n): return lambda _, args: caught.setdefault(n, {}).setdefault(current_batch.get(), args[0].detach())
    handles = [m.register_forward_pre_hook(catch(n)) for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"]
    run = record(model, texts, tokenizer=tokenizer, max_length=96, base_names="input", **QUIET)
    for h in handles: h.remove()
    ids = [tokenizer(t, truncation=True, max_length=96).input_ids for t in texts]
    for n, seen in caught.items():
        flat = [(-abs(v), i, place // x.shape[-1], place % x.shape[-1])
                for i, x in seen.items() for v, place in zip(*(t.tolist() for t in x.flatten().abs().topk(8)))]
        top = run[n, "input"].top
        assert [(-abs(e.value), e.batch, e.position[1], e.channel) for e in top] == sorted(flat)[:8], n
        for e in top:
            assert e.value == seen[e.batch][e.position][e.channel].item() and e.position[0] == 0
            assert e.token == tokenizer.decode([ids[e.batch][e.position[1]]]) and e.token in e.context
            assert e.context == tokenizer.decode(ids[e.batch][max(0, e.position[1] - 8):e.position[1] + 9])
    assert {e.channel for e in run["model.layers.1.self_attn.q_proj", "input"].top} <= set(channels)
    assert run.has_text and "holds pieces of the calibration text" in repr(run)


def test_tokens_of_parts_are_tokens_of_the_whole(tiny):
    model, tokenizer = tiny
    texts = calibration_texts()[:6]
    options = dict(tokenizer=tokenizer, max_length=48, base_names="input", batch_size=2, **QUIET)
    whole = record(model, texts, **options)
    parts = [record(model, texts[i:i + 2], batch_indices=[i // 2], **options) for i in (4, 0, 2)]
    assert record_equal(merged(parts, random.Random(0)), whole)
    assert all(e.token is not None for s in whole.tensors.values() for e in s.top)
    assert all(e.token is None and e.context is None for s in record(model, texts, keep_text=False, **options).tensors.values() for e in s.top)


def test_a_batch_that_was_skipped_does_not_keep_others_from_being_told(tiny):
    "Its values are larger than all that come later, but they are not in the record."
    class Embedded(Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.fc = torch.nn.Embedding(128, 16), Linear(16, 16)
        def forward(self, input_ids): return self.fc(self.embed(input_ids))
    model, bad = Embedded(), torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(): model.embed.weight[1, 0], model.embed.weight[2:5] = math.nan, 1e3
    data = [bad, torch.arange(10, 40)[None], torch.arange(40, 100)[None]]
    run = record(model, data, tokenizer=tiny[1], nonfinite="skip", base_names="input", **QUIET)
    stats = run["fc", "input"]
    assert stats.skipped == 1 and stats.max < 10 and len(stats.top) == 8
    assert all(e.token == tiny[1].decode([int(data[e.batch][e.position])]) for e in stats.top)


def test_flattened_tokens_are_told_and_other_rows_are_not(tiny):
    "OPT's MLP sees (batch * seq, hidden); a pooler's rows are no tokens."
    model, data = make_model("opt"), make_batches(1)
    run = record(model, data, tokenizer=tiny[1], base_names="input", **QUIET)
    for e in run["model.decoder.layers.0.fc1", "input"].top: assert e.token == tiny[1].decode([int(data[0]["input_ids"][e.position])])
    run = record(make_model("bert"), data, tokenizer=tiny[1], base_names="input", **QUIET)
    assert all(e.token is None for e in run["pooler.dense", "input"].top)
    assert all(e.token for e in run["encoder.layer.0.attention.self.query", "input"].top)


# --- arguments ---

WRONG = {
    "model": (dict(model="gpt2"), TypeError, "model must be a torch.nn.Module, got str"),
    "data none": (dict(data=None), TypeError, "data must be an iterable .* got NoneType"),
    "data number": (dict(data=7), TypeError, "data must be an iterable .* got int"),
    "data empty": (dict(data=[]), ValueError, "data is empty"),
    "data text": (dict(data=["a text"]), ValueError, "tokenizer=None; pass the model's tokenizer"),
    "data strange": (dict(data=[object()]), TypeError, "data holds a object"),
    "scheme name": (dict(scheme="FP9"), ValueError, "scheme='FP9' is not a preset"),
    "scheme number": (dict(scheme=0), ValueError, "scheme=0 must be a preset name"),
    "scheme empty": (dict(scheme=""), ValueError, "scheme='' is not a preset"),
    "scheme that does not fit": (dict(scheme="W4A16"), ValueError, "group_size is 128"),
    "observers name": (dict(observers="minmacks"), ValueError, "observer='minmacks' is unknown; registered are"),
    "observers number": (dict(observers=5), TypeError, "observers=5 must be names"),
    "observers of numbers": (dict(observers=[5]), TypeError, "observers must hold names, or pairs"),
    "observers pair without list": (dict(observers=("percentile", {"percentile": 99.9})), TypeError, "observers must hold names, or pairs"),
    "observers argument": (dict(observers=[("minmax", {"speed": 1})]), ValueError, "speed=1 is unknown to MinMaxObserver"),
    "observers value": (dict(observers=[("minmax", {"averaging_constant": 0})]), ValueError, "averaging_constant=0 must be a number in"),
    "observers path": (dict(observers=["evil.py:Run"]), ValueError, "looked up by name and never imported"),
    "tokenizer": (dict(tokenizer="gpt2"), TypeError, "tokenizer must be the model's tokenizer .* got str"),
    "tokenizer class": (dict(tokenizer=dict), TypeError, "tokenizer must be the model's tokenizer"),
    "mask": (dict(mask="bos"), TypeError, "mask must be token ids to leave out"),
    "batch_size": (dict(batch_size=0), ValueError, "batch_size=0 must be an int of at least 1"),
    "batch_size float": (dict(batch_size=1.5), ValueError, "batch_size=1.5 must be an int"),
    "max_length": (dict(max_length=-1), ValueError, "max_length=-1 must be an int of at least 1"),
    "base_names": (dict(base_names="wieght"), ValueError, "base_names=\\('wieght',\\) must be some of 'input', 'weight'"),
    "base_names empty": (dict(base_names=[]), ValueError, "base_names=\\(\\) must be some of"),
    "base_names number": (dict(base_names=5), TypeError, "base_names=5 must be some of"),
    "base_names nested": (dict(base_names=[["input"]]), (TypeError, ValueError), "base_names=.* must be some of"),
    "nonfinite": (dict(nonfinite="ignore"), ValueError, "nonfinite='ignore' is unknown; it must be one of 'raise', 'skip', 'record'"),
    "nonfinite number": (dict(nonfinite=5), ValueError, "nonfinite=5 is unknown"),
    "indices number": (dict(batch_indices=5), TypeError, "batch_indices=5 must be ints, one for each batch"),
    "indices negative": (dict(batch_indices=[-1]), ValueError, "batch_indices holds -1"),
    "indices float": (dict(batch_indices=[0.0]), ValueError, "batch_indices holds 0.0"),
    "indices bool": (dict(batch_indices=[True]), ValueError, "batch_indices holds True"),
    "indices twice": (dict(batch_indices=[1, 1]), ValueError, "batch_indices holds an index twice"),
    "indices too many": (dict(batch_indices=[0, 1, 2]), ValueError, "batch_indices has 3 indices, but data gave 1 batches"),
    "keep_text": (dict(keep_text="no"), TypeError, "keep_text='no' must be True or False"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named(case):
    model = make_model("llama_gqa")
    before = fingerprint(model)
    wrong, error, words = WRONG[case]
    call = dict(model=model, data=make_batches(1), **QUIET) | wrong
    with pytest.raises(error, match=words): record(call.pop("model"), call.pop("data"), **call)
    assert differences(before, fingerprint(model)) == []


def test_a_name_that_was_not_recorded_is_answered_with_what_comes_close(batches_and_whole):
    run = batches_and_whole[3]
    with pytest.raises(KeyError, match="close to it are .*q_proj"): run["model.layers.0.self_attn.q_prj", "input"]
    assert isinstance(run, CalibrationRecord) and "6 batches" in repr(run)


# --- modules with a common past, and when it ends ---

class Parting(Module):
    "Two Linears that read the same tensor, unless the batch says otherwise; the first one runs twice."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = Linear(8, 8), Linear(8, 8)

    def forward(self, x, apart):
        self.a(x)
        return self.b(x * 5 if apart.any() else x) + self.a(x)


@pytest.mark.parametrize("parts", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 1)])
def test_modules_share_a_memory_only_while_they_saw_the_same(parts):
    data = [dict(x=torch.randn(3, 8, generator=torch.Generator().manual_seed(i)), apart=torch.tensor([[part == 1]])) for i, part in enumerate(parts)]
    run = record(Parting(), data, observers=["minmax", "mse"], base_names="input", **QUIET)
    for name in ("minmax", "mse"):
        a, b = (new_observer(name, "input", DEFAULT_ARGS) for _ in "ab")
        for batch in data:
            for _ in range(2): a(batch["x"])
            b(batch["x"] * 5 if batch["apart"].any() else batch["x"])
        for key, alone in (("a", a), ("b", b)):
            found = run.conclusions[key, "input", name]
            assert bits(found.scale) == bits(alone.get_qparams()["scale"]) and found.counts.observations == alone.counts.observations
    assert (run["a", "input"].count, run["a", "input"].calls, run["a", "input"].batches) == (2 * 3 * 24, 6, 3) and run["b", "input"].count == 3 * 24
