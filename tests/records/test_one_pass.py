"""A record takes one pass: each tensor is read once, however many observers and modules look at it."""
import gc
import random
from collections import Counter

import pytest
import torch
from helpers import make_batches, make_model
from torch.nn import Linear, Module
from transformers import (
    AlbertConfig,
    AlbertModel,
)

import qcal_nb.records.collect
from qcal_nb.observers import TensorMemo
from qcal_nb.observers import DEFAULT_ARGS, new_observer
from qcal_nb.lifecycle import QuantizationMixin
from qcal_nb.stats import current_batch
from qcal_nb.observers import MinMaxObserver
from qcal_nb.stats import measure
from qcal_nb.records import record
from tests.records.samples import QUIET, bits, exact, merged


@pytest.fixture
def looks(monkeypatch):
    "How often each thing was done: tensors measured, and observers shown something."
    counts = Counter()
    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)
        return counted
    monkeypatch.setattr(qcal_nb.records.collect, "measure", counting("measure", qcal_nb.records.collect.measure))
    for read in ("_read_once", "_read_each"):
        monkeypatch.setattr(qcal_nb.stats.reading, read, counting(read, getattr(qcal_nb.stats.reading, read)))
    monkeypatch.setattr(
        MinMaxObserver, "update_statistics_from_observed",
        counting("minmax", MinMaxObserver.update_statistics_from_observed)
    )
    monkeypatch.setattr(
        qcal_nb.observers.histogram, "bucket_counts", counting("histogram", qcal_nb.observers.histogram.bucket_counts)
    )
    return counts


def forwards(model, counts):
    return model.register_forward_pre_hook(lambda *_: counts.update(["forward"]))


@pytest.mark.parametrize("observers", [
    ["static_minmax"], ["static_minmax", "minmax", "percentile", "entropy", "histogram_mse", "memoryless_minmax"]
])
def test_one_pass_for_any_number_of_observers(looks, observers):
    """Two layers, three batches: q, k, v read one tensor, gate and up another, o and down their own; and fourteen
    weights."""
    model = make_model("llama_gqa")
    handle = forwards(model, looks)
    run = record(model, make_batches(3), observers=observers, **QUIET)
    handle.remove()
    tensors = 2 * 4 * 3 + 14
    assert (looks["forward"], looks["measure"], looks["_read_once"], looks["_read_each"], looks["histogram"]) == (
        3, tensors, tensors, 0, 0
    )
    assert looks["minmax"] == (2 * 4 * 3 if "minmax" in observers else 0)  # a weight's follows from what was measured
    for layer in ("model.layers.0", "model.layers.1"):
        q, k, v = (run[f"{layer}.self_attn.{n}_proj", "input"] for n in "qkv")
        gate, up = (run[f"{layer}.mlp.{n}_proj", "input"] for n in ("gate", "up"))
        assert q is k is v and gate is up and q is not gate and q is not run[f"{layer}.self_attn.o_proj", "input"]
        if "minmax" not in observers: continue
        assert len({id(run.results[f"{layer}.self_attn.{n}_proj", "input", "minmax"]) for n in "qkv"}) == 1


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
    config = AlbertConfig(
        vocab_size=128, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64
    )
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
    assert stats.histogram == wanted.histogram and stats.top == wanted.top and stats.timeline == wanted.timeline
    assert stats.mean == wanted.mean
    alone = new_observer("minmax", "input", DEFAULT_ARGS)
    for xs in caught.values():
        for x in xs: alone(x)
    assert torch.equal(run.results[name, "input", "minmax"].scale, alone.get_qparams()["scale"])
    assert run.results[name, "input", "static_minmax"].counts.observations == 6


def test_a_recycled_address_is_another_tensor():
    "Thousands of tensors of one size come and go; the allocator gives the same places again and again."
    for size in (1, 2, 4):
        once, places = TensorMemo(size), []
        for i in range(400):
            x = torch.full((1000,), float(i))
            places.append(x.data_ptr())
            assert once(x, "value", lambda x=x: x[7].item()) == i
            del x
        assert len(set(places)) < 100


class Alters(Module):
    """Two Linears; what the first one read is changed in place, or freed and its place taken, before the second one
    reads."""

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


@pytest.mark.parametrize(
    "how, same", [("nothing", True), ("in place", False), ("freed", False), ("part", False), ("view", False)]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_only_the_same_state_of_a_tensor_is_taken_for_the_same(how, same, mode):
    model, x = Alters(how), torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with mode(): run = record(model, [x], observers=["minmax"], base_names="input", **QUIET)
    right = {"nothing": x, "in place": x + 1, "freed": x * 3.0, "view": x.flatten(0, 1), "part": x[:1]}[how]
    assert exact(run["a", "input"]) == exact(measure(x)) and exact(run["b", "input"]) == exact(measure(right))
    if mode is torch.no_grad: assert (run["a", "input"] is run["b", "input"]) == same
    alone = new_observer("minmax", "input", DEFAULT_ARGS)(right)
    assert torch.equal(run.results["b", "input", "minmax"].scale, alone.get_qparams()["scale"])


def test_outputs_and_the_head(looks):
    model, data, caught = make_model("llama_gqa"), make_batches(2), {}
    def catch(name): return lambda _m, _a, out: caught.setdefault(name, []).append(out.detach().clone())
    handles = [m.register_forward_hook(catch(n)) for n, m in model.named_modules() if isinstance(m, Linear)]
    run = record(model, data, base_names=["output", "lm_head_output"], **QUIET)
    for h in handles: h.remove()
    assert set(run.tensors) == {(n, "output") for n in caught} and ("lm_head", "output") in run.tensors
    for name, outs in caught.items():
        assert exact(run[name, "output"]) == exact(measure(outs[0], 0) | measure(outs[1], 1))
    assert ("lm_head", "output") not in record(model, data[:1], base_names="output", **QUIET).tensors
    assert ("lm_head", "input") in record(model, data[:1], scheme=QuantizationMixin(scheme="FP8"), **QUIET).tensors


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
    data = [
        dict(x=torch.randn(3, 8, generator=torch.Generator().manual_seed(i)), apart=torch.tensor([[part == 1]]))
        for i, part in enumerate(parts)
    ]
    run = record(Parting(), data, observers=["minmax", "mse"], base_names="input", **QUIET)
    for name in ("minmax", "mse"):
        a, b = (new_observer(name, "input", DEFAULT_ARGS) for _ in "ab")
        for batch in data:
            for _ in range(2): a(batch["x"])
            b(batch["x"] * 5 if batch["apart"].any() else batch["x"])
        for key, alone in (("a", a), ("b", b)):
            found = run.results[key, "input", name]
            assert bits(found.scale) == bits(alone.get_qparams()["scale"])
            assert found.counts.observations == alone.counts.observations
    assert (run["a", "input"].count, run["a", "input"].calls, run["a", "input"].batches) == (2 * 3 * 24, 6, 3)
    assert run["b", "input"].count == 3 * 24
