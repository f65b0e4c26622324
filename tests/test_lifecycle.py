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


WEIGHTS_ONLY = {"weights": dict(num_bits=8, strategy="channel")}


@pytest.mark.parametrize("scheme, targets", [("FP8", ["Linear"]), ("NVFP4", ["Linear"]), (WEIGHTS_ONLY, ["Linear", "Embedding"])])
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
    assert phase_of(model) == "calibrating" and model.model.layers[0].self_attn.q_proj.input_observer.counts.batches == 1
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


def test_end_calibration_without_what_writes_the_scales_says_what_does():
    model, modifier = make_model(next(iter(CONFIGS))), QuantizationModifier(**STATIC)
    run_until(model, modifier, "fed", make_batches())
    before = fingerprint(model)
    said = r"not computed: .*Their observers have seen data; on_end\(State\(model\)\) writes"
    with pytest.raises(ValueError, match=said): modifier.end_calibration(model)
    assert fingerprint(model) == before and phase_of(model) == "calibrating"
    modifier.on_end(State(model))
    assert phase_of(model) == "calibrated"


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
    assert phase_of(twin) == "original" and phase_of(model) == "calibrated"
    assert torch.equal(outputs(twin, data[0]), outputs(make_model("llama_gqa"), data[0]))


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
    modifier = QuantizationModifier(config_groups={"g": scheme}, ignore=["lm_head"], input_observer="static_minmax")
    calibrate(make_model("llama_gqa"), make_batches(), modifier, progress=False)
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


# --- what a reviewer broke ---

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


@pytest.mark.parametrize("dtype, big", [(torch.float16, 6e4), (torch.float32, 3e38)])
def test_a_range_too_wide_for_its_dtype_is_an_error_and_no_scale(dtype, big):
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4)).to(dtype), torch.tensor([[big, -big, 0, 0]], dtype=dtype)
    inputs = dict(num_bits=8, strategy="tensor", symmetric=False)
    modifier = QuantizationModifier(config_groups={"g": dict(targets=["Linear"], input_activations=inputs)})
    with pytest.raises(NonFiniteError, match="0, input: the range .* is too wide for a scale in torch"):
        calibrate(model, [x], modifier, progress=False)
    assert phase_of(model) == "calibrating" and model[0].input_scale.isnan().all()


def test_a_tensor_without_any_finite_value_contributes_nothing():
    nan, two = torch.full((2, 8), float("nan")), torch.full((2, 8), 2.0)
    def scale(data):
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        calibrate(model, data, QuantizationModifier(scheme="INT8_STATIC", nonfinite="record"), progress=False)
        return model[0].input_scale
    assert torch.equal(scale([nan, two]), scale([two])) and torch.equal(scale([two, nan]), scale([two]))
    with pytest.raises(ValueError, match="0.input"): scale([nan])


def test_skip_takes_the_whole_batch_out():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    twice = torch.nn.Sequential(model[0], torch.nn.Identity(), model[0])  # the module runs twice in a batch; the second time on its own output
    with torch.no_grad(): model[0].weight.fill_(1e30)
    modifier = QuantizationModifier(scheme="FP8", nonfinite="skip")
    calibrate(twice, [torch.full((1, 8), 1e-30), torch.full((1, 8), 1e10)], modifier, progress=False)
    kept = twice[0].input_scale.item()
    reset_quantization(twice)
    alone = torch.nn.Sequential(model[0], torch.nn.Identity(), model[0])
    calibrate(alone, [torch.full((1, 8), 1e-30)], QuantizationModifier(scheme="FP8"), progress=False)
    assert kept == alone[0].input_scale.item()


def test_a_weight_that_cannot_be_observed_stops_the_end_before_it_writes():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with torch.no_grad(): model[0].weight[0, 0] = float("nan")
    modifier = QuantizationModifier(scheme="FP8", nonfinite="skip", ignore=[])
    run_until(model, modifier, "started", [])
    model[1](torch.randn(2, 8))
    model[0].input_observer(torch.randn(2, 8))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"0\.weight\. Their weights hold non-finite values: mend them"): modifier.on_end(State(model))
    assert differences(before, fingerprint(model)) == []


def test_a_copy_made_during_calibration_shares_scales_with_its_own_layers():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(scheme="NVFP4A16", ignore=["lm_head"])
    run_until(model, modifier, "started", [])
    twin = deepcopy(model)
    with torch.no_grad(): twin.model.layers[0].self_attn.k_proj.weight.mul_(100)
    modifier.on_end(State(twin))
    shared = {n: getattr(twin.model.layers[0].self_attn, n).weight_global_scale.item() for n in ("q_proj", "k_proj", "v_proj")}
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


def test_update_weight_zp_scale_sees_what_was_written_through_data():
    from qcal_nb.calibration import update_weight_zp_scale
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    run_until(model, QuantizationModifier(scheme="FP8"), "started", [])
    update_weight_zp_scale(model[0])
    before = model[0].weight_scale.clone()
    model[0].weight.data.mul_(2)
    update_weight_zp_scale(model[0])
    assert torch.equal(model[0].weight_scale, 2 * before)


def test_a_modifier_cannot_be_changed_but_copied():
    modifier = QuantizationModifier(**FP8)
    with pytest.raises(ValueError, match="frozen"): modifier.scheme = "W8A8"
    other = modifier.model_copy(update=dict(scheme="W8A8"))
    assert other.resolved_config != modifier.resolved_config and other.ignore == ["lm_head"]


def test_saving_a_calibrated_model_with_pickle_is_refused_in_words(tmp_path):
    model = make_model("llama_gqa")
    calibrate(model, make_batches(), QuantizationModifier(**FP8), progress=False)
    with pytest.raises(TypeError, match="cannot be pickled .*reset_quantization"): torch.save(model, tmp_path / "model.pt")
    reset_quantization(model)
    torch.save(model, tmp_path / "model.pt")


def test_coverage_outlives_the_model_and_not_a_reset():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    calibrate(model, make_batches(), modifier, progress=False)
    assert len(modifier.coverage) == 28
    del model
    gc.collect()
    assert len(modifier.coverage) == 28


def test_compute_out_of_order_and_unknown_events():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    with pytest.raises(LifecycleError, match="cannot compute scales of a model that is original; initialize_quantization first"):
        modifier.on_event(State(model), Event(EventType.SEQUENTIAL_EPOCH_END))
    with pytest.raises(ValueError, match="event type 'tea' is unknown"): modifier.on_event(State(model), Event("tea"))


@pytest.mark.parametrize("recipe, words", [
    (dict(scheme="FP8", ignore=["re:.*"]), "this recipe quantizes nothing"),
    (dict(scheme="UNQUANTIZED"), "this recipe quantizes nothing"),
    (dict(scheme="FP8", ignore=["lmhead"]), "ignore 'lmhead' matches no module"),
])
def test_recipes_that_do_less_than_they_say_warn(recipe, words):
    with pytest.warns(UserWarning, match=words): QuantizationModifier(**recipe).initialize_quantization(make_model("llama_gqa"))


@pytest.mark.parametrize("spelling", ["minmax", "MinMax"])
def test_arguments_of_a_replaced_observer_are_dropped(spelling):
    kwargs = dict(observer=spelling, observer_kwargs={"averaging_constant": 0.5})
    weights, inputs = dict(num_bits=8, strategy="channel", **kwargs), dict(num_bits=8, strategy="tensor", **kwargs)
    groups = {"g": dict(targets=["Linear"], weights=weights, input_activations=inputs)}
    model = make_model("llama_gqa")
    calibrate(model, make_batches(), QuantizationModifier(config_groups=groups, ignore=["lm_head"], input_observer="static_minmax"), progress=False)
    assert phase_of(model) == "calibrated"


def test_modules_that_run_without_their_forward_are_named():
    model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(16, 2, batch_first=True))
    with pytest.warns(UserWarning, match="0, 0.self_attn: torch computes these without calling their Linear modules"):
        QuantizationModifier(scheme="FP8").initialize_quantization(model)
