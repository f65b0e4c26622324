"""Steps in whatever order, searched by hypothesis: reset is the identity."""
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch
from helpers import differences, fingerprint, make_batches, make_model, outputs, qparams
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from qcal_nb.lifecycle import LifecycleError, QuantizationModifier, State, phase_of, reset_quantization, unfuse_experts
from qcal_nb.pipelines import calibrate
from qcal_nb.session import Session


class SteppingAround(RuleBasedStateMachine):
    """Any walk through a session, back and forth, ends where a straight walk would: reset after anything is the
    identity."""

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
    def forgetful(past): pass
    model, data = make_model("llama_tied"), make_batches(2)
    session = Session(model, data)
    session.initialize()
    session.start()
    session.feed()
    with patch("qcal_nb.session.progress.Past.take_back", forgetful): session.back()
    # not taken back: feeding again would count it twice
    assert model.model.layers[0].mlp.up_proj.input_observer.counts.batches == 1


KV = dict(num_bits=8, type="float", strategy="attn_head", symmetric=True, dynamic=False)
RECIPES = [
    dict(scheme="FP8"), dict(scheme="NVFP4", weight_observer="imatrix_mse", ignore=["lm_head"]),
    dict(scheme="W8A8", kv_cache_scheme=KV, ignore=["lm_head"]),
    dict(config_groups={"a": dict(targets=["re:.*self_attn$"], input_activations=KV)}),
    dict(scheme="FP8", input_observer="percentile", ignore=["lm_head"], on_uncalibrated="skip"), dict(scheme="W4A16"),
]


class Anything(RuleBasedStateMachine):
    """Whatever is done to a model, in whatever order, by recipes that take turns: reset is the identity. Steps out of
    order must be refused, not fail."""

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

    @rule(options=st.sampled_from(
        [{}, dict(pipeline="sequential"), dict(pipeline="sequential", propagate="quantized"), dict(all_experts=False)]
    ))
    def calibrate_at_once(self, options):
        with suppress(LifecycleError, ValueError):
            calibrate(self.model, self.data, self.modifier, progress=False, **options)

    @rule(options=st.sampled_from([{}, dict(pipeline="sequential")]))
    def fail_half_way(self, options):
        last = [m for m in self.model.modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in type(m).__name__][-1]
        handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ArithmeticError))
        with suppress(LifecycleError, ValueError, ArithmeticError):
            calibrate(self.model, self.data, self.modifier, progress=False, **options)
        handle.remove()

    @rule()
    def take_experts_apart(self):
        with suppress(LifecycleError): unfuse_experts(self.model)

    @rule()
    def reset(self):
        reset_quantization(self.model)
        assert differences(self.before, fingerprint(self.model)) == []
        assert torch.equal(outputs(self.model, self.data[0]), self.exact)

    def teardown(self):
        if hasattr(self, "model"): self.reset()


Anything.TestCase.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)
TestAnything = Anything.TestCase
TestAnything.pytestmark = [pytest.mark.filterwarnings("ignore")]
