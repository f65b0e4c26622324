"""A record concludes what each observer by itself concludes."""
import itertools
import math
import random
from collections import Counter

import pytest
import torch
from helpers import make_batches, qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Linear, Module, Sequential
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from qcal_nb.observers import DEFAULT_ARGS, new_observer
from qcal_nb.records import result_from_stats
from qcal_nb.lifecycle import QuantizationMixin, QuantizationModifier
from qcal_nb.observers import Registry, find_observer
from qcal_nb.pipelines import calibrate
from qcal_nb.stats import measure
from qcal_nb.records import record
from tests.records.samples import DTYPES, NARROW, QUIET, bits, merged, tensor_of

OBSERVERS = [name for name in Registry.registered_names() if not find_observer(name).needs_gradients]


SCHEMES = dict(FP8="FP8", INT8_STATIC="INT8_STATIC", W8A8="W8A8", NVFP4="NVFP4", MXFP4="MXFP4",
               W4A16=dict(weights=dict(num_bits=4, strategy="group", group_size=32, symmetric=False)))
STATIC_INPUTS = dict(FP8=("scale", "zero_point"), INT8_STATIC=("scale", "zero_point"), NVFP4=("global_scale",))
HISTOGRAMS = {"entropy", "histogram_mse", "percentile"}


def one_layer(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**NARROW, num_key_value_heads=1)).to(dtype).eval()


@pytest.mark.filterwarnings("ignore:.*(observer|imatrix):UserWarning")
@pytest.mark.parametrize(
    "scheme, dtype", [*((s, torch.float32) for s in SCHEMES), ("FP8", torch.bfloat16), ("NVFP4", torch.bfloat16)]
)
def test_all_at_once_is_each_alone_in_a_calibration(scheme, dtype):
    data, compared = make_batches(3), Counter()
    run = record(
        one_layer(dtype), data, scheme=QuantizationMixin(scheme=SCHEMES[scheme], ignore=["lm_head"]),
        observers=OBSERVERS, **QUIET
    )
    for observer, part in itertools.product(OBSERVERS, ("weight", "input")):
        found = {k[0]: c for k, c in run.results.items() if k[1:] == (part, observer)}
        assert len(found) == 7
        if part == "input" and "imatrix" in observer: impossible = "it weighs the columns of a weight"
        else:
            fine = scheme == "FP8" if part == "weight" else scheme != "NVFP4"
            impossible = "keeps one histogram per tensor" if observer in HISTOGRAMS and not fine else ""
        assert all(
            bool(c.reason) == bool(impossible) and impossible in c.reason for c in found.values()
        ), (observer, part)
        if impossible or part == "input" and scheme not in STATIC_INPUTS: continue
        model = one_layer(dtype)
        calibrate(
            model,
            data,
            QuantizationModifier(scheme=SCHEMES[scheme], ignore=["lm_head"], **{f"{part}_observer": observer}),
            **QUIET,
        )
        for name, value in qparams(model).items():
            module, _, field = name.rpartition(f".{part}_")
            if not module or part == "input" and field not in STATIC_INPUTS[scheme]: continue
            ours = getattr(found[module], field)
            assert bits(ours.to(value.dtype)) == bits(value), (observer, name)
            compared[observer] += 1
    assert set(compared) == set(OBSERVERS) - (HISTOGRAMS if scheme in ("NVFP4", "MXFP4", "W4A16", "W8A8") else set())


def test_fused_weights_share_one_global_scale_of_each_observer():
    run = record(
        one_layer(), make_batches(1), scheme="NVFP4", observers=["static_minmax", "mse", "imatrix_mse"], **QUIET
    )
    for name in run.observers:
        q, k, v, o = (run.results[f"model.layers.0.self_attn.{n}_proj", "weight", name].global_scale for n in "qkvo")
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
        calibrate(
            model, data, QuantizationModifier(scheme=scheme, **{f"{part}_observer": observer}), nonfinite=policy,
            **QUIET
        )
        for layer in "02":
            right, found = qparams(model)[f"{layer}.{part}_{field}"], run.results[layer, part, observer]
            assert bits(getattr(found, field)) == bits(right), (observer, layer, part)
    stats = run["0", "input"]
    assert (stats.nan, stats.inf, stats.skipped, stats.batches) == (
        1, 1, 0 if policy == "record" else 2, 5 if policy == "record" else 3
    )
    assert stats.first_nonfinite.batch == 1 and stats.first_nonfinite.position == (2, 3)
    right = [x for i, x in enumerate(data) if policy == "record" or i not in (1, 3)]
    assert stats.count == sum(int(x.isfinite().sum()) for x in right)
    assert set(stats.timeline.points) == ({0, 1, 2, 3, 4} if policy == "record" else {0, 2, 4})


@pytest.mark.parametrize("policy", ["record", "skip"])
def test_a_weight_with_a_nan(policy):
    model = Sequential(Linear(8, 8))
    with torch.no_grad(): model[0].weight[1, 2] = math.nan
    run = record(
        model, [torch.ones(2, 8)], nonfinite=policy, scheme="FP8", observers=["static_minmax", "mse", "imatrix_mse"],
        **QUIET
    )
    for name in run.observers:
        alone = new_observer(name, "weight", run.results["0", "weight", name].args)
        alone.nonfinite = policy
        if hasattr(alone, "hear"): alone.hear(torch.ones(2, 8))
        alone(model[0].weight.detach())
        found = run.results["0", "weight", name]
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
    assert run.results["runs", "weight", label].scale is not None
    assert "no data reached the module" in run.results["idle", "weight", label].reason
    assert run["idle", "input"].count == 0 and run.results["idle", "input", label].scale is None


def test_arguments_of_an_observer_count(tiny):
    asked = ["percentile", ("percentile", {"percentile": 99.0}), ("minmax", {"averaging_constant": 1.0}), "minmax"]
    data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    run = record(Sequential(Linear(16, 16)), data, observers=asked, base_names="input", **QUIET)
    assert run.observers == ["percentile", "percentile(percentile=99.0)", "minmax(averaging_constant=1.0)", "minmax"]
    for one, label in zip(asked, run.observers):
        alone = new_observer(one, "input", DEFAULT_ARGS)
        for x in data: alone(x)
        assert bits(run.results["0", "input", label].scale) == bits(alone.get_qparams()["scale"])
    assert len({run.results["0", "input", label].scale.item() for label in run.observers}) == 4


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_statistics_alone_conclude_what_the_observer_would(seed):
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES[:3])
    data = [
        x for i in range(3) if (x := tensor_of(rng, 8).to(dtype).nan_to_num(0.0, 9.0, -9.0).clamp(-1e4, 1e4)).numel()
    ]
    stats = merged([measure(x, i) for i, x in enumerate(data)], rng)
    for name in ("static_minmax", "percentile", "entropy", "histogram_mse"):
        alone = new_observer(name, "input", DEFAULT_ARGS)
        for x in data: alone(x)
        assert bits(result_from_stats(stats, "input", name).scale) == bits(alone.get_qparams()["scale"]), name
