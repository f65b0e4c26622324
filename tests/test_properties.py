"""What must hold for all values, shapes and orders, searched by hypothesis."""
import math
from collections import Counter
from contextlib import suppress
from unittest.mock import patch

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, initialize_module_for_quantization
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from helpers import differences, fingerprint, make_batches, make_model, outputs, qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from qcal_nb.lifecycle import LifecycleError, QuantizationModifier, State, phase_of, reset_quantization, unfuse_experts
from qcal_nb.observers.base import Observer, flatten_for_calibration
from qcal_nb.pipelines import calibrate
from qcal_nb.records import TensorStats, measure
from qcal_nb.schemes import code_points, preset
from qcal_nb.session import Session

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
        assert (observer.min_vals.item(), observer.max_vals.item()) == (everything.min().item(), everything.max().item())


@given(STREAMS, st.floats(1e-3, 1.0))
def test_minmax_is_an_exponential_moving_average(stream, c):
    "Against the closed form in float64: weights c (1-c)^(n-i), and (1-c)^n for the first."
    observer, n = observed("minmax", stream, averaging_constant=c), len(stream) - 1
    weights = [(1 - c) ** n] + [c * (1 - c) ** (n - i) for i in range(1, n + 1)]
    for got, values in ((observer.min_vals, [t.min().item() for t in stream]), (observer.max_vals, [t.max().item() for t in stream])):
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
    assert torch.equal(first["scale"], second["scale"]) and all(torch.equal(v, before[k]) for k, v in observer.get_statistics().items())


WEIGHTS = {"tensor": {}, "channel": {}, "group": dict(group_size=4), "block": dict(block_structure=[3, 5]),
           "tensor_group": dict(group_size=4, num_bits=4, type="float", scale_dtype="torch.float8_e4m3fn")}


@given(st.sampled_from(sorted(WEIGHTS)), st.integers(1, 9), st.integers(1, 4))
def test_what_flatten_leaves_is_the_shape_of_the_parameter(strategy, rows, groups):
    layer = torch.nn.Linear(4 * groups, rows, bias=False)
    args = QuantizationArgs(**(dict(num_bits=8, strategy=strategy) | WEIGHTS[strategy]))
    from compressed_tensors.quantization import QuantizationScheme
    initialize_module_for_quantization(layer, QuantizationScheme(targets=["Linear"], weights=args))
    flat = flatten_for_calibration(layer.weight, "weight", args)
    scale = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)(layer.weight).get_qparams()["scale"]
    assert flat.shape[1:-1] == scale.shape == layer.weight_scale.shape
    if strategy != "block": assert Counter(flat.flatten().tolist()) == Counter(layer.weight.flatten().tolist())
    assert flat.shape[0] == 1


@given(tensors((4, 8)), st.sampled_from(["FP8", "INT8_STATIC", "W8A8"]))
def test_fake_quantization_is_idempotent(x, name):
    args = preset(name).weights
    q = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)(x).get_qparams()
    once = fake_quantize(x, q["scale"], q["zero_point"], args)
    assert torch.allclose(fake_quantize(once, q["scale"], q["zero_point"], args), once, rtol=1e-6, atol=0)


@given(tensors((4, 8)))
def test_quantized_values_are_scaled_code_points(x):
    args = preset("INT8_STATIC").input_activations
    q = observed("static_minmax", [x]).get_qparams()
    steps = fake_quantize(x, q["scale"], q["zero_point"], args).double() / q["scale"].double()
    assert set(steps.round().flatten().tolist()) <= set(code_points(args).tolist()) and (steps - steps.round()).abs().max() < 1e-3


@given(STREAMS)
def test_statistics_of_parts_are_those_of_the_whole(stream):
    parts, whole = TensorStats(), measure(torch.stack(stream))
    for tensor in stream: parts |= measure(tensor)
    assert (parts.count, parts.min, parts.max) == (whole.count, whole.min, whole.max)
    assert math.isclose(parts.mean, whole.mean, rel_tol=1e-9, abs_tol=1e-9) and math.isclose(parts.std, whole.std, rel_tol=1e-6, abs_tol=1e-4)


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(width=32)).map(torch.from_numpy))
def test_nonfinite_values_are_counted_and_never_enter(x):
    stats, fine = measure(x), x[torch.isfinite(x)]
    assert (stats.nan, stats.inf, stats.count) == (int(x.isnan().sum()), int(x.isinf().sum()), fine.numel())
    observer = Observer.load_from_registry("static_minmax", base_name="input", args=INPUT)
    observer.nonfinite = "record"
    if fine.numel():
        observer(x)
        assert (observer.min_vals.item(), observer.max_vals.item()) == (fine.min().item(), fine.max().item())


class SteppingAround(RuleBasedStateMachine):
    "Any walk through a session, back and forth, ends where a straight walk would: reset after anything is the identity."

    @initialize(scheme=st.sampled_from(["FP8", "INT8_STATIC", "W8A8"]))
    def begin(self, scheme):
        self.scheme, self.data, self.model = scheme, make_batches(4), make_model("llama_tied")
        self.before = fingerprint(self.model)
        self.session = Session(self.model, self.data, scheme=scheme)

    def can(self, step): return hasattr(self, "session") and self.session.legal()[step] is None

    @precondition(lambda self: self.can("initialize"))
    @rule()
    def go_initialize(self): self.session.initialize()

    @precondition(lambda self: self.can("start"))
    @rule()
    def go_start(self): self.session.start()

    @precondition(lambda self: self.can("feed"))
    @rule(n=st.integers(1, 3))
    def go_feed(self, n): self.session.feed(n)

    @precondition(lambda self: self.can("back"))
    @rule()
    def go_back(self): self.session.back()

    @precondition(lambda self: self.can("end"))
    @rule()
    def go_end(self):
        self.session.end()
        straight = Session(make_model("llama_tied"), self.data, scheme=self.scheme)
        straight.initialize()
        straight.start()
        if self.session.fed: straight.feed(self.session.fed)
        straight.end()
        mine, theirs = qparams(self.model), qparams(straight.model)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert self.session.record.batches == straight.record.batches == self.session.fed
        assert self.session.record.tensors == straight.record.tensors

    def teardown(self):
        if not hasattr(self, "session"): return
        if phase_of(self.model) != "original": self.session.reset()
        assert differences(self.before, fingerprint(self.model)) == []


SteppingAround.TestCase.settings = settings(max_examples=25, stateful_step_count=14, deadline=None)
TestSteppingAround = SteppingAround.TestCase


def test_the_machine_above_can_fail():
    "Were a step back to forget the observers, the walk would be caught."
    def forgetful(model, state): pass
    model, data = make_model("llama_tied"), make_batches(2)
    session = Session(model, data)
    session.initialize()
    session.start()
    session.feed()
    with patch("qcal_nb.session.restore", forgetful): session.back()
    assert model.model.layers[0].mlp.up_proj.input_observer.counts.batches == 1  # not taken back: feeding again would count it twice


KV = dict(num_bits=8, type="float", strategy="attn_head", symmetric=True, dynamic=False)
RECIPES = [
    dict(scheme="FP8"), dict(scheme="NVFP4", weight_observer="imatrix_mse", ignore=["lm_head"]),
    dict(scheme="W8A8", kv_cache_scheme=KV, ignore=["lm_head"]),
    dict(config_groups={"a": dict(targets=["re:.*self_attn$"], input_activations=KV)}),
    dict(scheme="FP8", input_observer="percentile", ignore=["lm_head"], on_uncalibrated="skip"), dict(scheme="W4A16"),
]


class Anything(RuleBasedStateMachine):
    "Whatever is done to a model, in whatever order, by recipes that take turns: reset is the identity. Steps out of order must be refused, not fail."

    @initialize(name=st.sampled_from(["llama_tied", "mixtral", "opt"]))
    def begin(self, name):
        self.model, self.data = make_model(name), make_batches(2)
        self.before, self.exact = fingerprint(self.model), outputs(self.model, self.data[0])
        self.modifier = QuantizationModifier(**RECIPES[0])

    @rule(recipe=st.sampled_from(RECIPES))
    def take_another_recipe(self, recipe): self.modifier = QuantizationModifier(**recipe)

    @rule(step=st.sampled_from(["on_initialize", "on_start", "on_end"]))
    def step(self, step):
        with suppress(LifecycleError, ValueError): getattr(self.modifier, step)(State(self.model))

    @rule(unfuse=st.booleans())
    def initialize_again(self, unfuse):
        with suppress(ValueError): self.modifier.on_initialize(State(self.model), unfuse=unfuse)

    @rule()
    def feed(self): outputs(self.model, self.data[1])

    @rule()
    def a_block_has_seen_everything(self):
        with suppress(LifecycleError, RuntimeError):
            self.modifier.on_sequential_epoch_end(State(self.model), None, list(self.model.modules())[: 30])

    @rule(options=st.sampled_from([{}, dict(pipeline="sequential"), dict(pipeline="sequential", propagate="quantized"), dict(all_experts=False)]))
    def calibrate_at_once(self, options):
        with suppress(LifecycleError, ValueError): calibrate(self.model, self.data, self.modifier, progress=False, **options)

    @rule(options=st.sampled_from([{}, dict(pipeline="sequential")]))
    def fail_half_way(self, options):
        last = [m for m in self.model.modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__][-1]
        handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ArithmeticError))
        with suppress(LifecycleError, ValueError, ArithmeticError): calibrate(self.model, self.data, self.modifier, progress=False, **options)
        handle.remove()

    @rule()
    def take_experts_apart(self):
        with suppress(LifecycleError): unfuse_experts(self.model)

    @rule()
    def reset(self):
        reset_quantization(self.model)
        assert differences(self.before, fingerprint(self.model)) == [] and torch.equal(outputs(self.model, self.data[0]), self.exact)

    def teardown(self):
        if hasattr(self, "model"): self.reset()


Anything.TestCase.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)
TestAnything = Anything.TestCase
TestAnything.pytestmark = [pytest.mark.filterwarnings("ignore")]
