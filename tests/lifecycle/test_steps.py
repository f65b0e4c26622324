"""Steps in order, all or nothing."""
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from helpers import CONFIGS, differences, fingerprint, make_batches, make_model, outputs, qparams

from qcal_nb.lifecycle import (
    Event,
    EventType,
    LifecycleError,
    QuantizationModifier,
    State,
    changes,
    compute_remaining,
    compute_scales,
    end_calibration,
    initialize_quantization,
    lacking_data,
    phase_of,
    reset_quantization,
    snapshot,
    start_calibration,
)
from qcal_nb.pipelines import calibrate
from qcal_nb.schemes import preset
from tests.lifecycle.walking import FP8, STATIC, run_until


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


def test_steps_take_a_config_and_give_what_a_modifier_gives():
    "A config of compressed-tensors' own, without a recipe; the scales of one block are computed before the rest."
    by_steps, by_modifier, data = make_model("llama_gqa"), make_model("llama_gqa"), make_batches()
    modifier = QuantizationModifier(**STATIC)
    run_until(by_modifier, modifier, "ended", data)
    config = QuantizationConfig(config_groups={"g": preset("INT8_STATIC", ["Linear"])}, ignore=["lm_head"])
    initialize_quantization(by_steps, config)
    start_calibration(by_steps, config)
    names = {name.rpartition(".")[0] for name in lacking_data(by_steps, config, weights=True)}
    assert names == {n for n, m in by_steps.named_modules() if hasattr(m, "weight_scale")}
    for batch in data: outputs(by_steps, batch)
    compute_scales(by_steps, config, by_steps.model.layers[0].modules())
    assert lacking_data(by_steps, config) == []
    compute_remaining(by_steps, config)
    assert end_calibration(by_steps, config) == modifier.coverage
    assert all(torch.equal(v, qparams(by_modifier)[k]) for k, v in qparams(by_steps).items())


@pytest.mark.parametrize("step", [start_calibration, end_calibration, compute_remaining, compute_scales])
def test_steps_refuse_another_config(step):
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    run_until(model, modifier, "initialized" if step is start_calibration else "started", [])
    before = fingerprint(model)
    args = [model.modules()] if step is compute_scales else []
    with pytest.raises(LifecycleError, match="initialized with another recipe"):
        step(model, QuantizationModifier(**STATIC).resolved_config, *args)
    assert differences(before, fingerprint(model)) == []


def test_initialize_during_calibration_is_refused():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    run_until(model, modifier, "started", [])
    before = fingerprint(model)
    with pytest.raises(ValueError, match="in calibration; end it .* or take it back"):
        QuantizationModifier(**STATIC).initialize_quantization(model)
    assert differences(before, fingerprint(model)) == []


def test_a_calibrated_model_starts_anew_and_a_failure_keeps_its_scales():
    model, data = make_model("llama_gqa"), make_batches()
    calibrate(model, data, QuantizationModifier(**FP8), progress=False)
    before, scales = fingerprint(model), qparams(model)
    with pytest.raises(ValueError, match="group_size is 128"):
        QuantizationModifier(scheme="W4A16", ignore=["lm_head"]).initialize_quantization(model)
    assert differences(before, fingerprint(model)) == []
    assert all(torch.equal(v, scales[k]) for k, v in qparams(model).items())
    calibrate(model, data, QuantizationModifier(**STATIC), progress=False)
    fresh = make_model("llama_gqa")
    calibrate(fresh, data, QuantizationModifier(**STATIC), progress=False)
    assert qparams(model).keys() == qparams(fresh).keys()
    assert all(torch.equal(v, qparams(fresh)[k]) for k, v in qparams(model).items())
    reset_quantization(model)
    assert phase_of(model) == "original" and not qparams(model)


def test_end_refuses_unset_scales_by_name_and_skip_leaves_those_modules_alone():
    model = torch.nn.ModuleDict(dict(seen=torch.nn.Linear(8, 8), unseen=torch.nn.Linear(8, 8)))
    modifier = QuantizationModifier(scheme="FP8", targets="Linear")
    run_until(model, modifier, "started", [])
    x = torch.randn(4, 8)
    model["seen"](x)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"1 scale is not computed: unseen\.input\. Feed data"):
        modifier.on_end(State(model))
    assert differences(before, fingerprint(model)) == [] and model["seen"].input_scale.isnan().all()
    modifier.on_end(State(model), on_uncalibrated="skip")
    assert torch.equal(model["unseen"](x), torch.nn.functional.linear(x, model["unseen"].weight, model["unseen"].bias))
    assert not torch.equal(model["seen"](x), torch.nn.functional.linear(x, model["seen"].weight, model["seen"].bias))
    rows = {(row.module, row.base_name): row for row in modifier.coverage}
    assert rows["unseen", "input"].observations == 0 and not rows["unseen", "input"].computed
    assert rows["seen", "input"].computed
    reset_quantization(model)
    assert modifier.coverage == []


def test_end_calibration_without_what_writes_the_scales_says_what_does():
    model, modifier = make_model(next(iter(CONFIGS))), QuantizationModifier(**STATIC)
    run_until(model, modifier, "fed", make_batches())
    before = fingerprint(model)
    said = r"not computed: .*Their observers have seen data: on_end\(State\(model\)\) writes"
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


def test_nothing_runs_through_a_scale_that_was_not_computed():
    model, plain, data = make_model("llama_gqa"), make_model("llama_gqa"), make_batches()
    modifier = QuantizationModifier(
        config_groups={
            "g": dict(
                targets=["Linear"], weights=dict(num_bits=8, strategy="tensor"),
                output_activations=dict(num_bits=8, strategy="tensor")
            )
        },
        ignore=["lm_head"],
    )
    run_until(model, modifier, "started", [])
    for batch in data: assert torch.equal(outputs(model, batch), outputs(plain, batch))
    modifier.on_end(State(model))
    assert torch.isfinite(outputs(model, data[0])).all()
    assert not torch.equal(outputs(model, data[0]), outputs(plain, data[0]))


def test_the_callers_schemes_are_not_written_to():
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
    for step, action in dict(
        initialize=lambda: modifier.on_initialize(State(model)), start=lambda: modifier.on_start(State(model)),
        feed=lambda: outputs(model, data[0]), end=lambda: modifier.on_end(State(model))
    ).items():
        before = snapshot(model)
        action()
        told[step] = {c.module: c for c in changes(before, snapshot(model))}
    assert {n for n, c in told["initialize"].items() if c.parameters_added} == names
    assert {
        n for n, c in told["start"].items()
        if c.observers_added == ("input_observer", "weight_observer") and c.hooks_added == 1
    } == names
    assert told["feed"] == {}
    assert {
        n for n, c in told["end"].items()
        if c.scales_computed == ("input_scale", "weight_scale") and c.hooks_removed == 1
    } == names
    assert {c.status_after for n, c in told["end"].items() if n in names} == {"frozen"}


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
    with pytest.raises(TypeError, match="cannot be pickled .*reset_quantization"):
        torch.save(model, tmp_path / "model.pt")
    reset_quantization(model)
    torch.save(model, tmp_path / "model.pt")


def test_compute_out_of_order_and_unknown_events():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    with pytest.raises(
        LifecycleError, match="cannot compute scales of a model that is original; initialize_quantization first"
    ):
        modifier.on_event(State(model), Event(EventType.SEQUENTIAL_EPOCH_END))
    with pytest.raises(ValueError, match="event type 'tea' is unknown"): modifier.on_event(State(model), Event("tea"))


@pytest.mark.parametrize("recipe, words", [
    (dict(scheme="FP8", ignore=["re:.*"]), "this recipe quantizes nothing"),
    (dict(scheme="UNQUANTIZED"), "this recipe quantizes nothing"),
    (dict(scheme="FP8", ignore=["lmhead"]), "ignore 'lmhead' matches no module"),
])
def test_recipes_that_do_less_than_they_say_warn(recipe, words):
    with pytest.warns(UserWarning, match=words):
        QuantizationModifier(**recipe).initialize_quantization(make_model("llama_gqa"))


@pytest.mark.parametrize("spelling", ["minmax", "MinMax"])
def test_arguments_of_a_replaced_observer_are_dropped(spelling):
    kwargs = dict(observer=spelling, observer_kwargs={"averaging_constant": 0.5})
    weights, inputs = dict(num_bits=8, strategy="channel", **kwargs), dict(num_bits=8, strategy="tensor", **kwargs)
    groups = {"g": dict(targets=["Linear"], weights=weights, input_activations=inputs)}
    model = make_model("llama_gqa")
    calibrate(
        model,
        make_batches(),
        QuantizationModifier(config_groups=groups, ignore=["lm_head"], input_observer="static_minmax"),
        progress=False,
    )
    assert phase_of(model) == "calibrated"


def test_modules_that_run_without_their_forward_are_named():
    model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(16, 2, batch_first=True))
    with pytest.warns(UserWarning, match="out_proj and 2 more: the code of MultiheadAttention can read the weight"):
        QuantizationModifier(scheme="FP8").initialize_quantization(model)
