"""Steps in order, all or nothing, and the way back from every one of them: the same objects, nothing left behind, no copy of the weights."""
import gc
import tracemalloc
from copy import deepcopy

import pytest
import torch
from helpers import CONFIGS, differences, fingerprint, make_batches, make_model, outputs, qparams

from qcal_nb.lifecycle import Event, EventType, LifecycleError, QuantizationModifier, State, changes, phase_of, reset_quantization, restore, snapshot
from qcal_nb.observers.base import NonFiniteError
from qcal_nb.pipelines import calibrate

FP8 = dict(scheme="FP8", ignore=["lm_head"])
STATIC = dict(scheme="INT8_STATIC", ignore=["lm_head"])


def run_until(model, modifier, phase, data):
    "Take a model to a phase by hand."
    state = State(model)
    if phase == "original": return
    modifier.on_initialize(state)
    if phase == "initialized": return
    modifier.on_start(state)
    if phase == "started": return
    with torch.no_grad():
        for batch in data: model(**batch)
    if phase == "fed": return
    modifier.on_end(state)


@pytest.mark.parametrize("phase", ["original", "initialized", "started", "fed", "ended"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*cannot be quantized.*:UserWarning", "ignore:target.*matches no module:UserWarning")
def test_reset_from_every_phase(name, phase):
    model, data = make_model(name), make_batches()
    model.train()
    model.get_submodule(next(n for n, m in model.named_modules() if n and not list(m.children()))).eval()  # flags that differ between modules
    before, exact = fingerprint(model), outputs(make_model(name), data[0])
    run_until(model, QuantizationModifier(**FP8), phase, data)
    assert reset_quantization(model) is model
    assert differences(before, fingerprint(model)) == []
    assert torch.equal(outputs(model.eval(), data[0]), exact)


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4", "W8A8", "INT8_STATIC"])
def test_reset_ties_embeddings_again(scheme):
    model, data = make_model("llama_tied"), make_batches()
    before = fingerprint(model)
    calibrate(model, data, QuantizationModifier(scheme=scheme, targets=["Linear", "Embedding"] if scheme == "W8A8" else ["Linear"]), progress=False)
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
    assert phase_of(model) == "calibrating" and model.model.layers[0].self_attn.q_proj.input_observer.counts.batches == 2
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
    "Calibrating and resetting an 8 MB model never holds a copy of it: peak Python-visible memory for snapshots stays far below."
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


@pytest.mark.parametrize("step, phase, words", [
    ("on_start", "original", "cannot start a model that is original; initialize_quantization first"),
    ("on_end", "original", "cannot end a model that is original; initialize_quantization first"),
    ("on_end", "initialized", "cannot end a model that is initialized; start_calibration first"),
    ("on_start", "started", "cannot start a model that is calibrating"),
    ("on_start", "ended", "cannot start a model that is calibrated; initialize_quantization first"),
    ("on_end", "ended", "cannot end a model that is calibrated"),
])
def test_steps_out_of_order(step, phase, words):
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    run_until(model, modifier, phase, make_batches())
    before = fingerprint(model)
    with pytest.raises(LifecycleError, match=words): getattr(modifier, step)(State(model))
    assert differences(before, fingerprint(model)) == []


def test_initialize_during_calibration_is_refused():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    run_until(model, modifier, "started", [])
    before = fingerprint(model)
    with pytest.raises(ValueError, match="in calibration; end it .* or take it back"): QuantizationModifier(**STATIC).initialize_quantization(model)
    assert differences(before, fingerprint(model)) == []


def test_a_calibrated_model_starts_anew_and_a_failure_keeps_its_scales():
    model, data = make_model("llama_gqa"), make_batches()
    calibrate(model, data, QuantizationModifier(**FP8), progress=False)
    before, scales = fingerprint(model), qparams(model)
    with pytest.raises(ValueError, match="group_size is 128"): QuantizationModifier(scheme="W4A16", ignore=["lm_head"]).initialize_quantization(model)
    assert differences(before, fingerprint(model)) == [] and all(torch.equal(v, scales[k]) for k, v in qparams(model).items())
    calibrate(model, data, QuantizationModifier(**STATIC), progress=False)
    fresh = make_model("llama_gqa")
    calibrate(fresh, data, QuantizationModifier(**STATIC), progress=False)
    assert qparams(model).keys() == qparams(fresh).keys() and all(torch.equal(v, qparams(fresh)[k]) for k, v in qparams(model).items())
    reset_quantization(model)
    assert phase_of(model) == "original" and not qparams(model)


def test_a_failure_half_way_undoes_what_was_done(monkeypatch):
    model = make_model("llama_gqa")
    before = fingerprint(model)
    def fail(_): raise MemoryError("no room")
    monkeypatch.setattr("qcal_nb.lifecycle._unset_scales", fail)
    with pytest.raises(MemoryError): QuantizationModifier(**FP8).initialize_quantization(model)
    assert differences(before, fingerprint(model)) == []


def test_end_refuses_unset_scales_by_name_and_skip_leaves_those_modules_alone():
    model = torch.nn.ModuleDict(dict(seen=torch.nn.Linear(8, 8), unseen=torch.nn.Linear(8, 8)))
    modifier = QuantizationModifier(scheme="FP8", targets="Linear")
    run_until(model, modifier, "started", [])
    x = torch.randn(4, 8)
    model["seen"](x)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"1 scale is not computed: unseen\.input\. Feed data"): modifier.on_end(State(model))
    assert differences(before, fingerprint(model)) == [] and model["seen"].input_scale.isnan().all()
    modifier.on_end(State(model), on_uncalibrated="skip")
    assert torch.equal(model["unseen"](x), torch.nn.functional.linear(x, model["unseen"].weight, model["unseen"].bias))
    assert not torch.equal(model["seen"](x), torch.nn.functional.linear(x, model["seen"].weight, model["seen"].bias))
    rows = {(row.module, row.base_name): row for row in modifier.coverage}
    assert rows["unseen", "input"].observations == 0 and not rows["unseen", "input"].computed and rows["seen", "input"].computed
    reset_quantization(model)
    assert modifier.coverage == []


def test_end_can_be_repeated_after_more_data():
    "A refused end consumes nothing: the moving average goes on where it was."
    def run(interrupted):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(dict(a=torch.nn.Linear(8, 8), b=torch.nn.Linear(8, 8)))
        modifier = QuantizationModifier(scheme="INT8_STATIC", targets="Linear")
        run_until(model, modifier, "started", [])
        xs = [torch.randn(4, 8) for _ in range(3)]
        model["a"](xs[0])
        if interrupted:
            with pytest.raises(ValueError, match="not computed"): modifier.on_end(State(model))
        model["a"](xs[1])
        model["b"](xs[2])
        modifier.on_end(State(model))
        return qparams(model)
    plain, interrupted = run(False), run(True)
    assert all(torch.equal(plain[k], interrupted[k]) for k in plain)


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
    assert phase_of(twin) == "original" and phase_of(model) == "calibrated" and torch.equal(outputs(twin, data[0]), outputs(make_model("llama_gqa"), data[0]))


def test_nothing_runs_through_a_scale_that_was_not_computed():
    model, plain, data = make_model("llama_gqa"), make_model("llama_gqa"), make_batches()
    modifier = QuantizationModifier(config_groups={"g": dict(targets=["Linear"], weights=dict(num_bits=8, strategy="tensor"),
                                                                  output_activations=dict(num_bits=8, strategy="tensor"))}, ignore=["lm_head"])
    run_until(model, modifier, "started", [])
    for batch in data: assert torch.equal(outputs(model, batch), outputs(plain, batch))
    modifier.on_end(State(model))
    assert torch.isfinite(outputs(model, data[0])).all() and not torch.equal(outputs(model, data[0]), outputs(plain, data[0]))


@pytest.mark.parametrize("policy, words", [("raise", None), ("skip", None), ("record", None)])
def test_nonfinite_values(policy, words):
    model, data = torch.nn.Sequential(torch.nn.Linear(8, 8)), [torch.randn(4, 8) for _ in range(3)]
    data[1][2, 5] = float("inf")
    modifier = QuantizationModifier(scheme="FP8", targets="Linear", nonfinite=policy)
    if policy == "raise":
        with pytest.raises(NonFiniteError, match=r"0, input: 1 non-finite value, the first \(inf\) at position \(2, 5\) of batch 1"):
            calibrate(model, data, modifier, progress=False)
        assert model[0].input_observer.counts.batches == 1
        return
    calibrate(model, data, modifier, progress=False)
    row = next(r for r in modifier.coverage if r.base_name == "input")
    assert row.nonfinite == 1 and row.skipped == (policy == "skip") and row.first_nonfinite.batch == 1 and row.first_nonfinite.position == (2, 5)
    kept = [data[0], data[2]] if policy == "skip" else [torch.where(torch.isfinite(d), d, 0) for d in data]
    assert torch.equal(model[0].input_scale.detach(), (torch.cat(kept).abs().max() / 448).reshape(1))


def test_the_argument_of_calibrate_overrides_the_modifiers_policy():
    model, bad = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.full((4, 8), float("nan"))
    calibrate(model, [torch.ones(4, 8), bad], QuantizationModifier(scheme="FP8", targets="Linear"), nonfinite="skip", progress=False)
    assert torch.isfinite(model[0].input_scale).all()


def test_a_nan_in_a_weight_never_becomes_a_scale():
    model = torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
    with torch.no_grad(): model[0].weight[3, 7] = float("nan")
    with pytest.raises(NonFiniteError, match=r"0, weight: 1 non-finite value.*\(3, 7\)"):
        calibrate(model, None, QuantizationModifier(scheme="NVFP4A16", targets="Linear"), progress=False)
    reset_quantization(model)
    calibrate(model, None, QuantizationModifier(scheme="NVFP4A16", targets="Linear", nonfinite="record"), progress=False)
    assert all(torch.isfinite(s.float()).all() for s in qparams(model).values())


def test_the_callers_schemes_are_not_written_to():
    from qcal_nb.schemes import preset
    scheme = preset("INT8_STATIC")
    scheme.weights.observer = None
    before = scheme.model_dump_json()
    calibrate(make_model("llama_gqa"), make_batches(), QuantizationModifier(config_groups={"g": scheme}, ignore=["lm_head"], input_observer="static_minmax"), progress=False)
    assert scheme.model_dump_json() == before


def test_events_do_what_the_methods_do():
    by_event, by_method, data = make_model("llama_gqa"), make_model("llama_gqa"), make_batches()
    run_until(by_method, QuantizationModifier(**STATIC), "ended", data)
    modifier, state = QuantizationModifier(**STATIC), State(by_event)
    modifier.on_initialize(state)
    modifier.on_event(state, Event(EventType.CALIBRATION_START))
    for batch in data:
        with torch.no_grad(): by_event(**batch)
        modifier.on_event(state, Event(EventType.BATCH_END))
    modifier.on_event(state, Event(EventType.SEQUENTIAL_EPOCH_END), modules=list(by_event.modules()))
    modifier.on_event(state, Event(EventType.CALIBRATION_END))
    assert all(torch.equal(v, qparams(by_event)[k]) for k, v in qparams(by_method).items())


def test_changes_tell_what_a_step_did():
    model, modifier, data = make_model("llama_gqa"), QuantizationModifier(**FP8), make_batches()
    names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    told = {}
    for step, action in dict(initialize=lambda: modifier.on_initialize(State(model)), start=lambda: modifier.on_start(State(model)),
                             feed=lambda: outputs(model, data[0]), end=lambda: modifier.on_end(State(model))).items():
        before = snapshot(model)
        action()
        told[step] = {c.module: c for c in changes(before, snapshot(model))}
    assert {n for n, c in told["initialize"].items() if c.parameters_added} == names
    assert {n for n, c in told["start"].items() if c.observers_added == ("input_observer", "weight_observer") and c.hooks_added == 1} == names
    assert told["feed"] == {}
    assert {n for n, c in told["end"].items() if c.scales_computed == ("input_scale", "weight_scale") and c.hooks_removed == 1} == names
    assert {c.status_after for n, c in told["end"].items() if n in names} == {"frozen"}
