"""The way back from every step: the same objects, nothing left behind, no copy of the weights."""
import gc
import tracemalloc
from copy import deepcopy

import pytest
import torch
from helpers import CONFIGS, differences, fingerprint, make_batches, make_model, outputs, qparams

from qcal_nb.lifecycle import QuantizationModifier, State, phase_of, reset_quantization, restore, snapshot
from qcal_nb.pipelines import calibrate
from tests.lifecycle.walking import FP8, STATIC, run_until

CACHE_BY_HEAD = dict(num_bits=8, type="float", strategy="attn_head", symmetric=True, dynamic=False)


@pytest.mark.parametrize("phase", ["original", "initialized", "started", "fed", "ended"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings(
    "ignore:.*cannot be quantized.*:UserWarning", "ignore:target.*matches no module:UserWarning"
)
def test_reset_from_every_phase(name, phase):
    model, data = make_model(name), make_batches()
    model.train()
    # flags that differ between modules
    model.get_submodule(next(n for n, m in model.named_modules() if n and not list(m.children()))).eval()
    before, exact = fingerprint(model), outputs(make_model(name), data[0])
    run_until(model, QuantizationModifier(**FP8), phase, data)
    assert reset_quantization(model) is model
    assert differences(before, fingerprint(model)) == []
    assert torch.equal(outputs(model.eval(), data[0]), exact)


WEIGHTS_ONLY = {"weights": dict(num_bits=8, strategy="channel")}


@pytest.mark.parametrize(
    "scheme, targets", [("FP8", ["Linear"]), ("NVFP4", ["Linear"]), (WEIGHTS_ONLY, ["Linear", "Embedding"])]
)
def test_reset_ties_embeddings_again(scheme, targets):
    model, data = make_model("llama_tied"), make_batches()
    before = fingerprint(model)
    calibrate(model, data, QuantizationModifier(scheme=scheme, targets=targets), progress=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and model.config.tie_word_embeddings is False
    reset_quantization(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_reset_after_an_exception_inside_a_forward_pass(error):
    model, data = make_model("llama_gqa"), make_batches()
    before, calls = fingerprint(model), []
    def explode(*_):
        calls.append(1)
        if len(calls) == 2: raise error("in the middle")
    handle = model.model.layers[1].mlp.register_forward_hook(explode)
    with pytest.raises(error): calibrate(model, data, QuantizationModifier(**FP8), progress=False)
    handle.remove()
    assert phase_of(model) == "calibrating"
    assert model.model.layers[0].self_attn.q_proj.input_observer.counts.batches == 1
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == []


def test_a_users_own_hook_and_attribute_survive():
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(**FP8)
    modifier.initialize_quantization(model)
    heard = []
    handle = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda m, a: heard.append(1))
    model.note = "mine"
    modifier.start_calibration(model)
    model(**make_batches()[0])
    reset_quantization(model)
    model(**make_batches()[0])
    assert heard == [1, 1] and model.note == "mine"
    handle.remove()


def test_reset_keeps_no_copy_of_the_weights():
    """Calibrating and resetting an 8 MB model never holds a copy of it: peak Python-visible memory for snapshots stays
    far below."""
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512, bias=False) for _ in range(8)])
    weights = [m.weight for m in model]
    modifier = QuantizationModifier(scheme="FP8", targets="Linear")
    before = {t.data_ptr() for t in living_tensors(large=200_000)}
    run_until(model, modifier, "initialized", [])
    modifier.start_calibration(model)
    model(torch.randn(4, 512))
    state = snapshot(model)
    modifier.on_end(State(model))
    assert {t.data_ptr() for t in living_tensors(large=200_000)} == before
    restore(model, state)
    reset_quantization(model)
    assert [m.weight for m in model] == weights and {t.data_ptr() for t in living_tensors(large=200_000)} == before


def living_tensors(large):
    gc.collect()
    return [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.numel() >= large]


def test_snapshots_are_small():
    model = make_model("llama_gqa")
    tracemalloc.start()
    kept = [snapshot(model) for _ in range(10)]
    size = tracemalloc.get_traced_memory()[0] / len(kept)
    tracemalloc.stop()
    assert size < 2000 * len(list(model.modules()))


def test_two_models_do_not_disturb_each_other():
    a, b, data = make_model("llama_gqa"), make_model("opt"), make_batches()
    before_b = fingerprint(b)
    modifier_a, modifier_b = QuantizationModifier(**FP8), QuantizationModifier(**STATIC)
    run_until(a, modifier_a, "fed", data)
    run_until(b, modifier_b, "fed", data)
    modifier_a.on_end(State(a))
    assert phase_of(b) == "calibrating" and phase_of(a) == "calibrated"
    reset_quantization(b)
    assert differences(before_b, fingerprint(b)) == [] and not any(s.isnan().any() for s in qparams(a).values())


def test_a_failure_half_way_undoes_what_was_done(monkeypatch):
    model = make_model("llama_gqa")
    before = fingerprint(model)
    def fail(_): raise MemoryError("no room")
    monkeypatch.setattr("qcal_nb.lifecycle.steps._unset_scales", fail)
    with pytest.raises(MemoryError): QuantizationModifier(**FP8).initialize_quantization(model)
    assert differences(before, fingerprint(model)) == []


def test_a_deep_copy_is_a_model_of_its_own():
    model, data = make_model("llama_gqa"), make_batches()
    modifier = QuantizationModifier(**FP8)
    run_until(model, modifier, "fed", data)
    twin = deepcopy(model)
    modifier.on_end(State(model))
    assert phase_of(twin) == "calibrating"
    modifier.on_end(State(twin))
    assert all(torch.equal(v, qparams(model)[k]) for k, v in qparams(twin).items())
    reset_quantization(twin)
    assert phase_of(twin) == "original" and phase_of(model) == "calibrated"
    assert torch.equal(outputs(twin, data[0]), outputs(make_model("llama_gqa"), data[0]))


class Tempered(torch.nn.Linear):
    "A Linear with parameters of its own that are called like ours."

    def __init__(self, *args):
        super().__init__(*args)
        self.out_scale = torch.nn.Parameter(torch.tensor([2.0, float("nan")]))
        self.my_zero_point = torch.nn.Parameter(torch.tensor([5, 6]), requires_grad=False)


def test_a_users_parameters_that_are_called_like_scales_are_left_alone():
    model = torch.nn.Sequential(Tempered(8, 8))
    before = fingerprint(model)
    state = snapshot(model)
    calibrate(model, [torch.randn(2, 8)], QuantizationModifier(scheme="FP8"), progress=False)
    restore(model, state)
    assert differences(before, fingerprint(model)) == []


def test_a_copy_made_during_calibration_shares_scales_with_its_own_layers():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(scheme="NVFP4A16", ignore=["lm_head"])
    run_until(model, modifier, "started", [])
    twin = deepcopy(model)
    with torch.no_grad(): twin.model.layers[0].self_attn.k_proj.weight.mul_(100)
    modifier.on_end(State(twin))
    shared = {
        n: getattr(twin.model.layers[0].self_attn, n).weight_global_scale.item() for n in ("q_proj", "k_proj", "v_proj")
    }
    assert len(set(shared.values())) == 1 and not model.model.layers[0].self_attn.k_proj.weight_observer.has_statistics


def test_back_keeps_the_order_in_which_hooks_run():
    model, modifier = torch.nn.Sequential(torch.nn.Linear(8, 8)), QuantizationModifier(scheme="FP8")
    run_until(model, modifier, "started", [])
    handle = model[0].register_forward_pre_hook(lambda m, args: (args[0] * 10,))
    model(torch.ones(1, 8))
    state, hooks, names = snapshot(model), list(model[0]._forward_pre_hooks), list(model.state_dict())
    modifier.on_end(State(model))
    restore(model, state)
    assert list(model[0]._forward_pre_hooks) == hooks and list(model.state_dict()) == names
    handle.remove()


def test_coverage_outlives_the_model_and_not_a_reset():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    calibrate(model, make_batches(), modifier, progress=False)
    assert len(modifier.coverage) == 28
    del model
    gc.collect()
    assert len(modifier.coverage) == 28


@pytest.mark.parametrize("first", [dict(scheme="INT8_STATIC"), dict(kv_cache_scheme=CACHE_BY_HEAD)])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_second_calibration_that_fails_half_way_is_taken_back_to_the_original(first, error):
    "What it leaves is noted on top of its own steps, not on top of the calibration that it replaced."
    model = make_model("llama_gqa")
    before = fingerprint(model)
    calibrate(model, make_batches(1), QuantizationModifier(**first, ignore=["lm_head"]), progress=False)
    def broken(*_): raise error
    handle = model.model.layers[1].register_forward_pre_hook(broken)
    with pytest.raises(error):
        calibrate(model, make_batches(2), QuantizationModifier(scheme="W8A8", ignore=["lm_head"]), progress=False)
    handle.remove()
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == []
