"""What people will really do wrong: each case with the words that the error must hold, and the model as it was
afterwards."""
import re

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from helpers import differences, fingerprint, make_batches, make_model

import qcal_nb
from qcal_nb.analysis import choose, ranges
from qcal_nb.calibration import call_observer, observe
from qcal_nb.lifecycle import QuantizationMixin, QuantizationModifier, match_report, phase_of, reset_quantization
from qcal_nb.observers import Observer, flatten_for_calibration
from qcal_nb.pipelines import calibrate
from qcal_nb.records import CalibrationRecord, record
from qcal_nb.session import Session, SessionError

FP8 = dict(scheme="FP8", ignore=["lm_head"])
GROUPED_INPUT = dict(num_bits=4, type="float", strategy="group", group_size=32)


def on_model(**recipe): return lambda model: QuantizationModifier(**recipe).initialize_quantization(model)


def with_data(data, **options):
    return lambda model: calibrate(model, data, QuantizationModifier(**FP8), progress=False, **options)


CASES = {
    # recipes: found when the modifier is made
    "unknown preset": (lambda m: QuantizationModifier(scheme="FP9"), ValueError, "scheme='FP9' is not a preset; choose one of"),
    "scheme of a wrong type": (lambda m: QuantizationModifier(scheme=8), ValueError, "scheme=8 must be a preset"),
    "scheme and groups": (lambda m: QuantizationModifier(scheme="FP8", config_groups={"g": ["Linear"]}), ValueError, "scheme and config_groups are both given"),
    "presets mixed with fields": (lambda m: QuantizationModifier(scheme={"FP8": ["Linear"], "weights": {"num_bits": 8}}), ValueError, "mixes presets ['FP8'] with fields ['weights']"),
    "misspelt scheme field": (lambda m: QuantizationModifier(scheme={"wieghts": {"num_bits": 8}}), ValueError, "unknown keys ['wieghts']"),
    "unknown observer": (lambda m: QuantizationModifier(scheme="FP8", input_observer="minmacks"), ValueError, "observer='minmacks' is unknown; registered are"),
    "observer is a path": (lambda m: QuantizationModifier(scheme="FP8", input_observer="evil.py:Run"), ValueError, "looked up by name and never imported"),
    "observer named twice": (lambda m: QuantizationModifier(scheme="FP8", observer={"input": "minmax"}, input_observer="minmax"), ValueError, "both name observers"),
    "observer for nothing": (lambda m: QuantizationModifier(scheme="FP8", observer={"inputs": "minmax"}), ValueError, "unknown keys ['inputs']; valid are 'weights', 'input', 'output'"),
    "misspelt field": (lambda m: QuantizationModifier(shceme="FP8"), ValueError, "shceme"),
    "unknown policy": (lambda m: QuantizationModifier(scheme="FP8", nonfinite="ignore"), ValueError, "nonfinite='ignore' is unknown; it must be one of 'raise', 'skip', 'record'"),
    "observer argument out of range": (lambda m: QuantizationModifier(config_groups={"g": dict(targets=["Linear"], input_activations=dict(
        num_bits=8, strategy="tensor", observer="minmax", observer_kwargs={"averaging_constant": 0}))}), ValueError, "averaging_constant=0 must be a number in (0, 1]"),
    "unknown observer argument": (lambda m: QuantizationModifier(config_groups={"g": dict(targets=["Linear"], input_activations=dict(
        num_bits=8, strategy="tensor", observer="minmax", observer_kwargs={"avg": 0.1}))}), ValueError, "avg=0.1 is unknown to MinMaxObserver; valid arguments: averaging_constant"),
    "nothing to quantize": (lambda m: calibrate(m, make_batches(), QuantizationModifier(), progress=False), ValueError, "nothing says what to quantize; give scheme='FP8'"),
    # recipes: found when the model is seen
    "group size that does not divide": (on_model(scheme="W4A16", ignore=["lm_head"]), ValueError, "model.layers.0.self_attn.q_proj: weights have 64 values in a row, group_size is 128"),
    "every offender is listed": (on_model(scheme="W4A16", targets=["re:.*(q|k)_proj$"]), ValueError, "the scheme does not fit 4 tensors"),
    "static groups of activations": (on_model(config_groups={"g": dict(targets=["Linear"], input_activations=GROUPED_INPUT)}), ValueError, "group scales of an activation must be dynamic"),
    "part of a fused group": (on_model(scheme="NVFP4A16", ignore=["re:.*k_proj", "lm_head"]), ValueError, "q_proj/k_proj/v_proj share one global scale, but k_proj would not be quantized"),
    "a modifier as a session's scheme": (lambda m: Session(m, scheme=QuantizationModifier(**FP8)), ValueError, "scheme is a QuantizationModifier, which says targets and ignore itself; pass it as recipe="),
    "not a model": (lambda m: QuantizationModifier(**FP8).initialize_quantization("gpt2"), TypeError, "model must be a torch.nn.Module, got str"),
    "activations by channel": (on_model(config_groups={"g": dict(targets=["Linear"], output_activations=dict(num_bits=8, strategy="channel"))}), ValueError, "output_activations cannot have strategy 'channel'"),
    "the input of an embedding": (on_model(scheme="FP8", targets=["Embedding"]), ValueError, "model.embed_tokens: the input of an Embedding is token ids"),
    "match_report of a preset": (lambda m: match_report(m, "FP8"), TypeError, "modifier must be a QuantizationModifier, got str"),
    # data
    "ids in lists of lists": (with_data([{"input_ids": [[1, 2], [3, 4]]}]), ValueError, "input_ids are lists of lists"),
    "a model by name": (lambda m: calibrate("gpt2", make_batches(), QuantizationModifier(**FP8), progress=False), TypeError, "model must be a torch.nn.Module, got str"),
    "recording a model by name": (lambda m: qcal_nb.record("gpt2", make_batches(), progress=False), TypeError, "model must be a torch.nn.Module, got str"),
    "recording empty data": (lambda m: qcal_nb.record(m, [], progress=False), ValueError, "data is empty"),
    "no data": (with_data(None), TypeError, "data must be an iterable of strings, token ids, tensors or dicts"),
    "empty data": (with_data([]), ValueError, "data is empty"),
    "only empty texts": (with_data([[]]), TypeError, "data holds a list"),
    "strings without a tokenizer": (with_data(["a text"]), ValueError, "data holds strings but tokenizer=None"),
    "a number": (with_data(7), TypeError, "got int"),
    "numbers": (with_data([1.5, 2.5]), TypeError, "data holds a float"),
    "dicts without ids": (with_data([{"txt": "a"}]), ValueError, "keys ['txt']"),
    "batch_size 0": (with_data(make_batches(), batch_size=0), ValueError, "batch_size=0 must be an int of at least 1"),
    "max_length as text": (with_data(make_batches(), max_length="512"), ValueError, "max_length='512'"),
    # options of calibrate
    "unknown pipeline": (with_data(make_batches(), pipeline="parallel"), ValueError, "pipeline='parallel' is unknown"),
    "datafree with activations": (with_data(None, pipeline="datafree"), ValueError, "cannot find the scales of activations"),
    "unknown attention": (with_data(make_batches(), attention="flash"), ValueError, "attention='flash' must be 'eager'"),
    "unknown on_uncalibrated": (with_data(make_batches(), on_uncalibrated="ignore"), ValueError, "on_uncalibrated='ignore' must be 'raise' or 'skip'"),
    "nonfinite of calibrate": (with_data(make_batches(), nonfinite="drop"), ValueError, "nonfinite='drop' is unknown"),
    "a preset instead of a modifier": (lambda m: calibrate(m, make_batches(), "FP8"), TypeError, "modifier must be a QuantizationModifier, got str; e.g. QuantizationModifier(scheme='FP8'"),
    # functions of one module
    "observing something that is no module": (lambda m: observe("weight", "weight"), TypeError, "module must be a torch Module or an iterable of them, got str"),
    "call_observer without a value": (lambda m: call_observer(m, "input"), ValueError, "base name 'input' needs the tensor"),
    "unknown base name": (lambda m: call_observer(m, "wieght"), ValueError, "base_name='wieght' is unknown; it must be one of weight, input, output, q, k, v"),
    # record, analysis, session
    "recording no tensor": (lambda m: qcal_nb.record(m, make_batches(), base_names=(), progress=False), ValueError, "must be some of 'input', 'weight'"),
    "recording without data": (lambda m: qcal_nb.record(m, None, progress=False), TypeError, "data must be an iterable"),
    "ranges of a model": (lambda m: ranges(m), TypeError, "record must be a CalibrationRecord"),
    "unknown order": (lambda m: choose(ranges(CalibrationRecord()), order="size"), ValueError, "order='size' is unknown"),
    "session with an unknown preset": (lambda m: Session(m, make_batches(), scheme="FP9"), ValueError, "'FP9' is not a preset"),
    "session step too early": (lambda m: Session(m, make_batches()).end(), SessionError, "cannot end: start the calibration first"),
    "session feeds nothing": (lambda m: Session(m, make_batches()).feed(0), ValueError, "n=0 must be an int of at least 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_says_what_is_wrong_and_the_model_is_unchanged(case):
    action, kind, words = CASES[case]
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(kind, match=re.escape(words)) as told: action(model)
    assert "errors.pydantic.dev" not in str(told.value) and "Value error" not in str(told.value)
    assert differences(before, fingerprint(model)) == [] and phase_of(model) == "original"


def test_a_model_on_the_meta_device():
    with torch.device("meta"): model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(ValueError, match="parameters without values .on the meta device, or lazy.; load its weights"):
        on_model(scheme="FP8", targets="Linear")(model)


def test_a_model_quantized_by_another_tool():
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    from qcal_nb.schemes import preset
    model = make_model("llama_gqa")
    apply_quantization_config(model, QuantizationConfig(config_groups={"g": preset("FP8")}), show_progress=False)
    before = fingerprint(model)
    for action in (on_model(**FP8), reset_quantization):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj was quantized elsewhere"):
            action(model)
    assert differences(before, fingerprint(model)) == []


def test_warnings_point_at_the_line_that_called():
    typo = QuantizationModifier(scheme="FP8", targets=["Liner"])
    other = QuantizationMixin(scheme="FP8", targets=["lm_head", "Liner"])
    for call in (
        with_data(make_batches()), typo.initialize_quantization,
        lambda m: record(m, make_batches(), scheme=other, progress=False)
    ):
        with pytest.warns(UserWarning) as caught: call(make_model("gpt2"))
        assert {w.filename for w in caught} == {__file__}, [(w.filename, str(w.message)) for w in caught]


def test_a_batch_longer_than_the_models_positions_warns():
    model = make_model("llama_gqa")
    with pytest.warns(
        UserWarning, match="a batch of 80 tokens is longer than the model's 64 positions; use max_length=64"
    ):
        calibrate(model, make_batches(shape=(1, 80)), QuantizationModifier(**FP8), progress=False)


@pytest.mark.filterwarnings("error")
def test_max_length_cuts_batches():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    calibrate(model, make_batches(2, shape=(1, 80)), modifier, max_length=64, progress=False)
    assert next(r for r in modifier.coverage if r.base_name == "input").elements == 2 * 64 * 64


@pytest.mark.parametrize("name, target, words", [
    ("llama_gqa", "Liner", "target 'Liner' matches no module of this LlamaForCausalLM"),
    ("gpt2", "Conv1D", "target 'Conv1D' matches only Conv1D, which cannot be quantized"),
    ("mixtral", "re:.*experts$", "matches only MixtralExperts, which cannot be quantized"),
])
def test_targets_that_match_nothing_warn(name, target, words):
    with pytest.warns(UserWarning, match=re.escape(words)): on_model(scheme="FP8", targets=[target])(make_model(name))


@pytest.mark.parametrize("name, kind", [("gpt2", "8 Conv1D"), ("mixtral", "2 MixtralExperts")])
def test_weights_that_no_scheme_can_reach_are_named(name, kind):
    model = make_model(name)
    with pytest.warns(UserWarning, match=rf"{kind}.* stay as they are"): on_model(**FP8)(model)
    rows = [r for r in match_report(model, QuantizationModifier(**FP8)) if r.type == kind.split()[1]]
    assert rows and not any(r.matched for r in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = make_model("llama_gqa", dtype)
    calibrate(model, make_batches(), QuantizationModifier(**FP8), progress=False)
    assert model.model.layers[0].mlp.up_proj.input_scale.dtype == dtype
    assert torch.isfinite(model(**make_batches()[0]).logits).all()


STRATEGIES = {
    "tensor": {}, "channel": {}, "group": dict(group_size=4), "tensor_group": dict(group_size=4),
    "block": dict(block_structure=[2, 2]), "token": dict(dynamic=True), "attn_head": {}
}
LEGAL = {
    "weight": {"tensor", "channel", "group", "tensor_group", "block"}, "input": {"tensor", "token"},
    "output": {"tensor", "token"}, "q": {"tensor", "attn_head"}, "k": {"tensor", "attn_head"},
    "v": {"tensor", "attn_head"}
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("base_name", LEGAL)
def test_illegal_strategies_name_both(base_name, strategy):
    shape = dict(weight=(8, 8), input=(2, 3, 8), output=(2, 3, 8)).get(base_name, (2, 2, 3, 8))
    value = torch.ones(shape)
    args = QuantizationArgs(num_bits=8, strategy=strategy, **STRATEGIES[strategy])
    if strategy in LEGAL[base_name]: assert flatten_for_calibration(value, base_name, args).numel() >= value.numel()
    else:
        with pytest.raises(ValueError, match=f"strategy '{strategy}' is not possible for base name '{base_name}'"):
            flatten_for_calibration(value, base_name, args)


@pytest.mark.parametrize("name", ["MinMax", "min_max", "MIN-MAX", "minmax"])
def test_observer_names_match_loosely(name):
    assert type(
        Observer.load_from_registry(name, base_name="input", args=QuantizationArgs(strategy="tensor"))
    ).__name__ == "MinMaxObserver"
