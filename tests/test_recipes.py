"""Recipes and configs say the same after a round trip; a checkpoint gives the logits that it was saved from, and leaves the model as it was."""
import json
import re
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from helpers import differences, fingerprint, make_batches, make_model, offload, outputs
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from qcal_nb.lifecycle import Event, EventType, LifecycleError, QuantizationModifier, State, phase_of, reset_quantization
from qcal_nb.models import load_tiny_llama
from qcal_nb.observers.base import Registry, find_observer
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import from_config, from_yaml, override, recipe_of, save_quantized, to_config, to_yaml
from qcal_nb.schemes import preset, preset_names

INT8 = dict(num_bits=8, type="int")
FP8 = dict(scheme="FP8", ignore=["lm_head"])
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


# --- round trips ---

def observers():
    "Names of observers, with arguments that differ from their defaults where we know a range."
    def kwargs(name):
        knows = "averaging_constant" in find_observer(name).defaults
        return st.fixed_dictionaries({}, optional={"averaging_constant": st.floats(0.01, 1.0)}) if knows else st.just({})
    return st.sampled_from(Registry.registered_names()).flatmap(lambda name: st.tuples(st.just(name), kwargs(name)))


TARGETS = st.lists(st.sampled_from(["Linear", "re:.*mlp.*", "lm_head", UP, "re:.*[qk]_proj$"]), min_size=1, max_size=3, unique=True)
LINEAR = TARGETS.map(lambda targets: [*dict.fromkeys(["Linear", *targets])])
IGNORE = st.lists(st.sampled_from(["lm_head", "re:.*down_proj", DOWN]), max_size=2, unique=True)
POLICIES = st.fixed_dictionaries({}, optional=dict(nonfinite=st.sampled_from(["skip", "record"]), on_uncalibrated=st.just("skip"),
                                                   bypass_divisibility_checks=st.just(True)))


@st.composite
def schemes(draw, targets=TARGETS):
    scheme = preset(draw(st.sampled_from(preset_names())), draw(targets))
    for part in ("weights", "input_activations"):
        args = getattr(scheme, part)
        if args is not None and not args.dynamic and draw(st.booleans()):
            args.observer, args.observer_kwargs = draw(observers())
    if scheme.weights is not None and draw(st.booleans()): scheme.format = "naive-quantized"
    try: QuantizationModifier(scheme=scheme)
    except ValueError: reject()  # not every observer is for every tensor
    return scheme


@st.composite
def modifiers(draw, targets=TARGETS):
    "Every form in which a recipe can be said."
    form = draw(st.sampled_from(["preset", "presets", "scheme", "fields", "groups"]))
    fields = dict(ignore=draw(IGNORE)) | draw(POLICIES)
    if form == "preset": fields |= dict(scheme=draw(st.sampled_from(preset_names())), targets=draw(targets))
    if form == "presets": fields["scheme"] = draw(st.dictionaries(st.sampled_from(preset_names()), targets, min_size=1, max_size=3))
    if form == "scheme": fields["scheme"] = draw(schemes(targets))
    if form == "fields": fields["scheme"] = draw(schemes(targets)).model_dump(exclude={"targets"})
    if form == "groups": fields["config_groups"] = {f"group_{i}": draw(schemes(targets)) for i in range(draw(st.integers(1, 3)))}
    if form in ("preset", "presets") and draw(st.booleans()):
        name = draw(st.sampled_from(["static_minmax", "minmax", "MINMAX", "memoryless-minmax"]))
        fields |= draw(st.sampled_from([dict(input_observer=name), dict(observer=dict(input=name)), dict(weight_observer="memoryless_minmax")]))
    return QuantizationModifier(**fields)


def plain(config): return json.loads(config.model_dump_json()) | dict(quantization_status="")


@settings(deadline=None)
@given(modifiers())
def test_yaml_and_back(modifier):
    again = from_yaml(to_yaml(modifier))
    assert again.resolved_config == modifier.resolved_config and plain(again.resolved_config) == plain(modifier.resolved_config)
    for field in ("nonfinite", "on_uncalibrated", "bypass_divisibility_checks"): assert getattr(again, field) == getattr(modifier, field)
    assert to_yaml(again) == to_yaml(modifier)


@settings(deadline=None)
@given(modifiers())
def test_json_and_back(modifier):
    again = from_config(json.loads(json.dumps(to_config(modifier))))
    assert again.resolved_config == modifier.resolved_config and plain(again.resolved_config) == plain(modifier.resolved_config)
    for source in (again.resolved_config, json.dumps({"quantization_config": to_config(modifier)})):
        assert from_config(source).resolved_config == modifier.resolved_config
    assert QuantizationConfig.model_validate(to_config(modifier)).config_groups == modifier.resolved_config.config_groups


@settings(deadline=None)
@given(modifiers(LINEAR), st.data(), st.sampled_from(["static_minmax", ("minmax", {"averaging_constant": 0.25})]))
def test_overrides_and_back(modifier, data, choice):
    groups = modifier.resolved_config.config_groups.values()
    def has_scales(part): return all((args := getattr(s, part)) is not None and args.dynamic is not True for s in groups)
    possible = [(base, part) for base, part in (("input", "input_activations"), ("weight", "weights")) if has_scales(part)]
    assume(possible)
    base_name, part = data.draw(st.sampled_from(possible))
    before = modifier.model_dump_json(), to_yaml(modifier)
    new = override(modifier, {UP: {base_name: choice}})
    assert (modifier.model_dump_json(), to_yaml(modifier)) == before
    mine = [s for s in new.resolved_config.config_groups.values() if UP in s.targets]
    assert len(mine) == 1 and getattr(mine[0], part).observer == (choice if isinstance(choice, str) else choice[0])
    assert from_yaml(to_yaml(new)).resolved_config == from_config(to_config(new)).resolved_config == new.resolved_config


@pytest.mark.parametrize("scheme", [dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True),
                                    dict(num_bits=4, type="int", strategy="attn_head", observer="static_minmax")])
def test_the_kv_cache_is_carried_both_ways(scheme):
    modifier = QuantizationModifier(**FP8, kv_cache_scheme=scheme)
    new = override(modifier, {UP: {"input": "minmax"}})
    for again in (from_yaml(to_yaml(modifier)), from_config(json.loads(json.dumps(to_config(modifier)))), new):
        assert again.kv_cache_scheme == again.resolved_config.kv_cache_scheme == QuantizationArgs(**scheme)


# --- what a recipe looks like ---

def test_a_recipe_holds_what_was_said():
    assert to_yaml(QuantizationModifier(**FP8)) == ("default_stage:\n  default_modifiers:\n    QuantizationModifier:\n"
                                                    "      scheme: FP8\n      ignore: [lm_head]\n")
    same = QuantizationModifier(ignore=["lm_head"], scheme="FP8", targets=["Linear"], nonfinite="raise")
    assert to_yaml(same) == to_yaml(QuantizationModifier(**FP8))


@pytest.mark.parametrize("text", [
    "QuantizationModifier: {scheme: FP8, ignore: [lm_head]}",
    "quant_stage:\n  quant_modifiers:\n    QuantizationModifier:\n      scheme: FP8\n      ignore: [lm_head]\n      start: 0.0\n",
    "quant_modifiers:\n  QuantizationModifier:\n    scheme: FP8\n    ignore: lm_head\n",
    '{"args": {}, "test_stage": {"run_type": "oneshot", "quant_modifiers": {"QuantizationModifier": {"scheme": "fp8", "ignore": ["lm_head"]}}}}',
    '{\n\t"QuantizationModifier": {"scheme": "FP8", "ignore": ["lm_head"]}\n}',
    "QuantizationModifier:\n  {targets: &t [Linear], scheme: {FP8: *t}, ignore: [lm_head], requires_calibration_data: true}\n",
])
def test_other_ways_to_write_it(text, tmp_path):
    expected = QuantizationModifier(**FP8).resolved_config
    path = tmp_path/"recipe.yaml"
    path.write_text(text)
    for source in (text, path, str(path)): assert from_yaml(source).resolved_config == expected


BAD_RECIPES = {
    "other modifiers": ("s_stage: {q_modifiers: {GPTQModifier: {scheme: W4A16}, AWQModifier: }}",
                        "asks for AWQModifier, GPTQModifier; supported is QuantizationModifier"),
    "no modifier": ("default_stage: {default_modifiers: {}}", "holds no QuantizationModifier, it must hold one"),
    "two of them": ("a_stage: {m_modifiers: {QuantizationModifier: {scheme: FP8}}}\nb_stage: {m_modifiers: {QuantizationModifier: {scheme: FP8}}}",
                    "holds 2 QuantizationModifiers, it must hold one; put their targets side by side"),
    "the same key twice": ("m_modifiers:\n  QuantizationModifier: {scheme: FP8}\n  QuantizationModifier: {scheme: W8A8}",
                           "QuantizationModifier stands twice"),
    "twice in JSON": ('{"QuantizationModifier": {"scheme": "FP8", "scheme": "W8A8"}}', "scheme stands twice"),
    "not YAML": ("default_stage: {default_modifiers: [", "cannot be read: while parsing"),
    "a list": ("- QuantizationModifier\n- b", "holds list, not keys and values"),
    "a tag": ("QuantizationModifier: {scheme: !!python/object/apply:os.system [ls]}", "could not determine a constructor for the tag"),
    "unknown field": ("QuantizationModifier: {shceme: FP8}", "shceme: Extra inputs are not permitted"),
    "unknown preset": ("QuantizationModifier: {scheme: FP9}", "scheme='FP9' is not a preset"),
    "unknown observer": ("QuantizationModifier: {scheme: FP8, input_observer: minmacks}", "observer='minmacks' is unknown"),
    "an observer to import": ("QuantizationModifier: {scheme: FP8, input_observer: 'evil.py:Run'}", "looked up by name and never imported"),
    "a bad number": ("QuantizationModifier: {config_groups: {g: {targets: [Linear], weights: {num_bits: x}}}}",
                     "weights.num_bits: Input should be a valid integer"),
    "unknown level": ("default: {QuantizationModifier: {scheme: FP8}}", "'default' is neither a stage (`..._stage:`)"),
    "a list of modifiers": ("quant_modifiers: [{QuantizationModifier: {scheme: FP8}}]", "'quant_modifiers' is neither"),
    "no fields": ("QuantizationModifier: FP8\n", "QuantizationModifier must hold fields, got 'FP8'"),
    "a field without a name": ("QuantizationModifier: {1: 2}", "1 is not a field's name"),
    "unknown in our section": ("QuantizationModifier: {scheme: FP8}\nqcal_nb: {nonfinit: skip}", "must hold some of nonfinite, on_uncalibrated"),
    "a bomb": ("l0: &l0 [x, x]\n" + "".join(f"l{i + 1}: &l{i + 1} [{', '.join([f'*l{i}'] * 10)}]\n" for i in range(8)),
               "expand to more than 1,000,000 values"),
    "endless": ("a_stage: &a {b_stage: *a}", "expand to more than 1,000,000 values"),
    "deep": ("{" * 3000, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_names_file_and_fault(case, tmp_path):
    text, words = BAD_RECIPES[case]
    path = tmp_path/"some recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error: from_yaml(path)
    assert "some recipe.yaml" in str(error.value) and type(error.value) is ValueError


def test_sources_that_are_none(tmp_path):
    with pytest.raises(TypeError, match="must be a path or the text of a recipe, got int"): from_yaml(3)
    with pytest.raises(FileNotFoundError, match="no_such.yaml"): from_yaml("no_such.yaml")
    (tmp_path/"binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary.yaml is not text"): from_yaml(tmp_path/"binary.yaml")
    with pytest.raises(TypeError, match="got LlamaForCausalLM; of a model: recipe_of"): to_yaml(make_model("llama_gqa"))
    with pytest.raises(ValueError, match="a value that YAML cannot"):
        to_yaml(QuantizationModifier(config_groups={"g": QuantizationScheme(targets=["Linear"], input_activations=dict(
            **INT8, strategy="tensor", observer="minmax", observer_kwargs={"triton_error_buffer": object()}))}))


KEYS = ["g", "targets", "weights", "input_activations", "num_bits", "strategy", "observer", "observer_kwargs", "group_size", "format"]
WORDS = st.sampled_from(["Linear", "re:(", "FP8", "minmax", "tensor", "", "x:y"])
GARBAGE = st.recursive(st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | WORDS, max_leaves=12, extend=lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["config_groups", "scheme", "targets", "ignore", "kv_cache_scheme", "observer", "weight_observer"]), GARBAGE))
def test_whatever_stands_in_a_file_is_a_modifier_or_a_valueerror(fields):
    for read, source in ((from_yaml, yaml.safe_dump({"QuantizationModifier": fields}) + "\n"), (from_config, {"quantization_config": fields})):
        try: assert isinstance(read(source), QuantizationModifier)
        except ValueError as error: assert type(error) is ValueError and str(error).startswith("the ")


# --- JSON ---

BAD_CONFIGS = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method is 'gptq'; only 'compressed-tensors' can be read"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quant_method is 'bitsandbytes'"),
    "not quantized": ({"model_type": "llama"}, "holds no config_groups: this is not the config of a quantized model"),
    "no groups": ({"quantization_config": {"quant_method": "compressed-tensors"}}, "holds no config_groups"),
    "a list": ({"quantization_config": [1]}, "must hold keys and values, got [1]"),
    "groups in a list": ({"quantization_config": {"config_groups": [1]}}, "config_groups"),
    "no targets": ({"quantization_config": {"config_groups": {"g": {"weights": {}}}}}, "targets: Field required"),
    "a misspelt field": ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bit": 8}}}}, "weights.num_bit: Extra inputs"),
    "an observer to import": ({"config_groups": {"g": {"targets": ["Linear"], "weights": {"observer": "a/b.py:C"}}}}, "never imported"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_names_file_and_fault(case, tmp_path):
    config, words = BAD_CONFIGS[case]
    (tmp_path/"config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path/"config.json"):
        with pytest.raises(ValueError, match=re.escape(words)) as error: from_config(source)
        assert "config.json" in str(error.value)


def test_damaged_config_files(tmp_path):
    (tmp_path/"config.json").write_text('{"quantization_config": {"config_groups": ')
    with pytest.raises(ValueError, match="config.json cannot be read"): from_config(tmp_path)
    with pytest.raises(TypeError, match="must be a dict, a config or a path, got int"): from_config(3)
    with pytest.raises(ValueError, match="the config cannot be read"): from_config("{" * 3000)
    with pytest.raises(FileNotFoundError): from_config(tmp_path/"elsewhere"/"config.json")


def test_left_overs_of_other_tools():
    fp8 = QuantizationModifier(**FP8)
    section = to_config(fp8) | {"version": "0.9", "global_compression_ratio": 1.5, "sparsity_config": {}, "transform_config": None}
    assert from_config(section).resolved_config == fp8.resolved_config
    for left in ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {"transform_config": {"config_groups": {}}}):
        with pytest.warns(UserWarning, match=next(iter(left))): again = from_config(section | left)
        assert again.resolved_config == fp8.resolved_config


def test_a_preset_by_name_in_a_config():
    config = {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}, "ignore": None}
    read, said = from_config({"compression_config": config}).resolved_config, QuantizationModifier(scheme="W4A16").resolved_config
    assert read.config_groups == {"W4A16": said.config_groups["group_0"]}


# --- overrides on a model ---

def observer_names(model): return {n: type(m.input_observer).__name__ for n, m in model.named_modules() if hasattr(m, "input_observer")}


@pytest.mark.parametrize("targets", [["Linear"], ["re:.*(mlp|attn).*"], ["re:.*_proj", "Linear"], [UP, "Linear"]], ids=str)
@pytest.mark.parametrize("asked", [{UP: {"input": "memoryless_minmax"}}, {"re:.*layers.0.*up_proj": {"input": "memoryless_minmax"}},
                                   {"re:.*": {"input": "minmax"}, UP: {"input": "memoryless_minmax"}},
                                   {UP: {"input": "memoryless_minmax"}, "Linear": {"input": "minmax"}}], ids=str)
def test_an_override_wins_whatever_the_targets(targets, asked):
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(scheme="FP8", targets=targets, ignore=["lm_head"])
    new = override(modifier, asked, model)
    new.initialize_quantization(model); new.start_calibration(model)
    names, rest = observer_names(model), "MinMaxObserver" if len(asked) > 1 else "StaticMinMaxObserver"
    assert names.pop(UP) == "MemorylessMinMaxObserver" and set(names.values()) == {rest} and len(names) == 13
    assert recipe_of(model).resolved_config == new.resolved_config


def test_an_override_of_an_override_replaces_it():
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    once = override(modifier, {UP: {"input": "minmax"}, DOWN: {"input": "minmax"}})
    twice = override(once, {UP: {"input": ("minmax", {"averaging_constant": 0.5})}}, model)
    groups = twice.resolved_config.config_groups
    assert sorted(s.targets for s in groups.values()) == [["Linear"], [UP], [DOWN]] and len(once.resolved_config.config_groups) == 2
    back = override(twice, {UP: {"input": "minmax"}})
    assert sorted(sorted(s.targets) for s in back.resolved_config.config_groups.values()) == [["Linear"], sorted([UP, DOWN])]


BAD_OVERRIDES = {
    "unknown module": ({"model.layers.9.mlp.up_proj": {"input": "minmax"}}, True, "'model.layers.9.mlp.up_proj' matches no module that is quantized"),
    "ignored": ({"lm_head": {"input": "minmax"}}, True, "'lm_head' matches no module that is quantized"),
    "ignored, without a model": ({"lm_head": {"input": "minmax"}}, False, "it is ignored by 'lm_head'"),
    "pattern, without a model": ({"re:.*up_proj": {"input": "minmax"}}, False, "is a pattern; pass model="),
    "unknown base name": ({UP: {"inputs": "minmax"}}, False, "'inputs' must be one of 'weight', 'input', 'output'"),
    "no such tensor": ({UP: {"output": "minmax"}}, False, "its output has no observer that could be replaced: not quantized"),
    "unknown observer": ({UP: {"input": "minmacks"}}, False, "observer='minmacks' is unknown"),
    "unknown argument": ({UP: {"input": ("minmax", {"avg": 1})}}, False, "avg=1 is unknown to MinMaxObserver"),
    "not a choice": ({UP: {"input": 3}}, False, "input=3 must be an observer's name, or (name, arguments)"),
}


@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_a_bad_override(case):
    asked, with_model, words = BAD_OVERRIDES[case]
    with pytest.raises(ValueError, match=re.escape(words)):
        override(QuantizationModifier(**FP8), asked, make_model("llama_gqa") if with_model else None)


def test_a_name_that_could_be_of_two_classes_needs_the_model():
    modifier = QuantizationModifier(scheme={"FP8": ["Linear"], "W8A16": ["Embedding"]})
    with pytest.raises(ValueError, match="depends on its class; pass model= as well"): override(modifier, {UP: {"input": "minmax"}})
    new = override(modifier, {UP: {"input": "minmax"}}, make_model("llama_gqa"))
    assert next(s for s in new.resolved_config.config_groups.values() if UP in s.targets).weights.type == "float"


# --- checkpoints ---

def ids(): return torch.arange(40).reshape(2, 20)


def state_of(model):
    "All that could have been changed: modules, parameters, configs, and the generation config."
    return fingerprint(model) | {"generation": {k: repr(v) for k, v in vars(model.generation_config).items()}}


def saved(model, path, tokenizer=None):
    "Save; check that the model is as it was, and load: logits before, logits of what was loaded, what did not fit."
    with torch.no_grad(): before, logits = state_of(model), model(ids()).logits
    save_quantized(model, path, tokenizer)
    assert differences(before, state_of(model)) == []
    loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    with torch.no_grad(): return logits, loaded(ids()).logits, {k: v for k, v in info.items() if v}


def calibrated(dtype=torch.float32, **recipe):
    model, tokenizer = load_tiny_llama(dtype)
    calibrate(model, make_batches(2, 1024), QuantizationModifier(**recipe), progress=False)
    return model


def test_a_checkpoint_loads_with_the_same_logits_fast(tmp_path):
    a, b, unfit = saved(calibrated(scheme="INT8_STATIC", ignore=["lm_head"]), tmp_path/"new"/"folder")
    assert torch.equal(a, b) and unfit == {}


UNPACKED_AS_BF16 = [n for n in preset_names() if n.startswith(("NVFP", "MXFP"))]
SAVED = [n for n in preset_names() if n not in ("UNQUANTIZED", "INT8")]    # INT8 is W8A8 by another name


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SAVED)
def test_every_preset_loads_with_the_same_logits(scheme, tmp_path):
    a, b, unfit = saved(calibrated(torch.bfloat16, scheme=scheme, ignore=["lm_head"]), tmp_path/"bf16")
    assert torch.equal(a, b) and unfit == {}
    if scheme in UNPACKED_AS_BF16: return
    a, b, unfit = saved(calibrated(scheme=scheme, ignore=["lm_head"]), tmp_path/"fp32")
    assert torch.equal(a, b) and unfit == {} and a.dtype == b.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("scheme", UNPACKED_AS_BF16)
def test_formats_that_are_unpacked_as_bf16_say_so_on_a_float32_model(scheme, tmp_path):
    model = calibrated(scheme=scheme, ignore=["lm_head"])
    with pytest.warns(UserWarning, match=r"unpacks .* to torch.bfloat16, but this model is torch.float32"): a, b, unfit = saved(model, tmp_path/"x")
    assert b.dtype == torch.bfloat16 and not torch.equal(a, b.float()) and unfit == {}


def group(**parts): return dict(config_groups={"g": dict(targets=["Linear"], **parts)}, ignore=["lm_head"])


CASES = {
    "head too, untied": dict(scheme="FP8"),
    "embedding of eight bits": dict(scheme={"W8A16": ["Embedding"], "FP8": ["Linear"]}),
    "embedding of four bits": dict(scheme={"W4A16": ["Linear", "Embedding"]}),
    "asymmetric inputs": group(weights=dict(INT8, strategy="tensor"), input_activations=dict(INT8, symmetric=False, strategy="tensor")),
    "asymmetric channels": group(weights=dict(INT8, strategy="channel", symmetric=False), input_activations=dict(INT8, strategy="tensor")),
    "asymmetric groups": group(weights=dict(num_bits=4, strategy="group", group_size=32, symmetric=False)),
    "outputs": group(weights=dict(INT8, strategy="tensor"), output_activations=dict(INT8, strategy="tensor", symmetric=False)),
    "inputs alone": group(input_activations=dict(INT8, strategy="tensor")),
    "fp8 weights alone": group(weights=dict(num_bits=8, type="float", strategy="channel")),
    "two formats": dict(scheme={"FP8": ["re:.*mlp.*"], "W4A16": ["re:.*attn.*"]}),
    "a format that was asked for": group(weights=dict(INT8, strategy="channel")) | dict(config_groups={"g": dict(
        targets=["Linear"], weights=dict(INT8, strategy="channel"), format="naive-quantized")}),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_other_schemes_load_with_the_same_logits(case, dtype, tmp_path):
    model = calibrated(dtype, **CASES[case])
    a, b, unfit = saved(model, tmp_path/"x")
    assert torch.equal(a, b) and unfit == {}
    loaded, mine = (m.resolved_config.config_groups for m in (from_config(tmp_path/"x"), recipe_of(model)))
    if case == "embedding of four bits": assert loaded.pop("group_0_naive-quantized").targets == ["model.embed_tokens"]  # one scheme, two formats
    assert loaded == mine


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied", "qwen3", "gemma2", "opt", "phi", "gpt_neox"])
def test_architectures(name, tmp_path):
    model = make_model(name)
    calibrate(model, make_batches(), QuantizationModifier(**FP8), progress=False)
    before, batch = state_of(model), make_batches(1)[0]
    save_quantized(model, tmp_path/name)
    assert differences(before, state_of(model)) == []
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path/name), batch), outputs(model, batch))


def test_an_encoder(tmp_path):
    model, batch = make_model("bert"), make_batches(1)[0]
    calibrate(model, [batch], QuantizationModifier(scheme="FP8"), progress=False)
    save_quantized(model, tmp_path/"bert")
    assert torch.equal(outputs(AutoModel.from_pretrained(tmp_path/"bert"), batch), outputs(model, batch))


def test_a_class_of_ones_own_that_is_a_linear(tmp_path):
    class Mine(torch.nn.Linear): "Compressed-tensors 0.19 would store its float weight, and quantize it no more when it is loaded."
    model = make_model("llama_gqa")
    model.model.layers[0].mlp.up_proj.__class__ = Mine
    calibrate(model, make_batches(), QuantizationModifier(**FP8), progress=False)
    a, b, unfit = saved(model, tmp_path/"x")
    assert torch.equal(a, b) and unfit == {} and load_file(tmp_path/"x"/"model.safetensors")[f"{UP}.weight"].dtype == torch.float8_e4m3fn


def test_what_was_not_reached_is_saved_as_it_was_and_ignored(tmp_path):
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    modifier.initialize_quantization(model); modifier.start_calibration(model)
    mlp = model.model.layers[1].mlp
    mlp.forward = torch.zeros_like
    with torch.no_grad(): model(ids())
    del mlp.forward
    modifier.on_event(State(model), Event(EventType.CALIBRATION_END), on_uncalibrated="skip")
    a, b, unfit = saved(model, tmp_path/"x")
    ignore = json.loads((tmp_path/"x"/"config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", *(f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down"))] and torch.equal(a, b) and unfit == {}
    assert to_config(model)["ignore"] == ignore


def test_what_a_checkpoint_holds(tmp_path):
    model, tokenizer = load_tiny_llama()
    modifier = override(QuantizationModifier(**FP8), {UP: {"input": ("minmax", {"averaging_constant": 0.2})}})
    calibrate(model, make_batches(2, 1024), modifier, progress=False)
    folder = save_quantized(model, tmp_path/"x", tokenizer)
    assert folder == tmp_path/"x" and [p.name for p in tmp_path.iterdir()] == ["x"]
    assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors", "recipe.yaml", "tokenizer.json"}
    section = json.loads((folder/"config.json").read_text())["quantization_config"]
    assert section | {"version": ""} == to_config(model) | {"version": ""}
    expected = dict(quant_method="compressed-tensors", format="float-quantized", ignore=["lm_head"], quantization_status="compressed",
                    kv_cache_scheme=None)
    assert {k: section[k] for k in expected} == expected
    own = section["config_groups"]["group_1"]
    assert own["targets"] == [UP] and own["input_activations"]["observer_kwargs"] == {"averaging_constant": 0.2}
    assert from_config(folder).resolved_config == from_yaml(folder/"recipe.yaml").resolved_config == modifier.resolved_config
    tensors = load_file(folder/"model.safetensors")
    assert tensors[f"{UP}.weight"].dtype == torch.float8_e4m3fn and "lm_head.weight" not in tensors
    assert not [n for n in tensors if n.endswith("zero_point")]
    scales = {n: p for n, p in model.named_parameters() if n.endswith("_scale")}
    assert len(scales) == 56 and all(torch.equal(tensors[n], p) for n, p in scales.items())
    again = save_quantized(model, tmp_path/"again", tokenizer)
    assert (again/"model.safetensors").read_bytes() == (folder/"model.safetensors").read_bytes()


KV = dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [
    dict(scheme="FP8", kv_cache_scheme=KV), dict(kv_cache_scheme=KV | dict(strategy="attn_head"), targets=[]),
    dict(config_groups={"attention": QuantizationScheme(targets=["re:.*self_attn$"], input_activations=KV),
                        "linear": QuantizationScheme(targets=["Linear"], weights=KV | dict(strategy="channel"))}),
], ids=["FP8 and cache", "cache alone", "attention"])
@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "opt"])
def test_a_checkpoint_with_a_quantized_cache_loads_with_the_same_logits(name, recipe, tmp_path):
    model, batch = make_model(name), make_batches(1)[0]
    before, exact = state_of(model), outputs(model, batch)
    calibrate(model, make_batches(), QuantizationModifier(**recipe, ignore=["lm_head"]), progress=False)
    expected = outputs(model, batch)
    save_quantized(model, tmp_path/"x")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path/"x")
    assert torch.equal(outputs(loaded, batch), expected) and not torch.equal(expected, exact)
    states = [n for n, _ in loaded.named_parameters() if n.endswith(("k_scale", "v_scale"))]
    assert len(states) == 4
    reset_quantization(model)
    assert differences(before, state_of(model)) == []


@pytest.mark.parametrize("recipe", [
    dict(scheme="FP8", kv_cache_scheme=KV, ignore=["lm_head", "re:.*layers.0.*"]),
    dict(config_groups={"attention": QuantizationScheme(targets=["re:.*layers.1.self_attn$"], input_activations=KV)})])
def test_a_cache_that_is_only_partly_quantized_is_not_saved(recipe, tmp_path):
    "On loading every attention module would be hooked, and some would have scales that nobody wrote."
    model = make_model("llama_gqa")
    calibrate(model, make_batches(), QuantizationModifier(**recipe), progress=False)
    with pytest.raises(ValueError, match=r"1 of 2 attention modules have no scales \(model.layers.0.self_attn\)"): save_quantized(model, tmp_path/"x")
    assert not (tmp_path/"x").exists()


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model_is_saved_as_it_would_be_otherwise(kind, tmp_path):
    recipe, files = dict(scheme="FP8", ignore=["lm_head"]), []
    for where in ("not", kind):
        model = make_model("llama_gqa")
        if where != "not": offload(model, kind, tmp_path/"offload")
        calibrate(model, make_batches(), QuantizationModifier(**recipe), progress=False)
        files.append((save_quantized(model, tmp_path/where)/"model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_after_saving_the_model_can_be_had_back(tmp_path):
    model = make_model("llama_tied")
    before, logits = state_of(model), outputs(model, make_batches(1)[0])
    calibrate(model, make_batches(), QuantizationModifier(scheme="FP8"), progress=False)
    save_quantized(model, tmp_path/"x")
    reset_quantization(model)
    assert differences(before, state_of(model)) == [] and torch.equal(outputs(model, make_batches(1)[0]), logits)


def test_nothing_is_copied_but_small_weights():
    "What is not quantized goes to the file from where it is; what is quantized becomes smaller."
    from qcal_nb.recipes import _checkpoint_tensors
    model = calibrated(scheme="W4A16", ignore=["lm_head"])
    state, _ = _checkpoint_tensors(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    fresh = sum(t.nbytes for t in state.values() if t.untyped_storage().data_ptr() not in own)
    assert 0 < fresh < 0.15 * sum(p.nbytes for p in model.parameters())


class Broken:
    def save_pretrained(self, folder):
        (Path(folder)/"tokenizer.json").write_text("half of it")
        raise OSError("disk full")


def test_a_failure_leaves_neither_a_folder_nor_a_trace(tmp_path, monkeypatch):
    model = calibrated(scheme="W4A16", ignore=["lm_head"])
    before = state_of(model)
    with pytest.raises(OSError, match="disk full"): save_quantized(model, tmp_path/"x", Broken())
    assert list(tmp_path.iterdir()) == [] and differences(before, state_of(model)) == []
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): save_quantized(model, tmp_path/"x")
    assert list(tmp_path.iterdir()) == [] and differences(before, state_of(model)) == []
    monkeypatch.undo()
    (tmp_path/"x").mkdir()                                                # an empty folder will do
    save_quantized(model, tmp_path/"x")
    assert (tmp_path/"x"/"config.json").exists()


def test_nothing_is_overwritten(tmp_path):
    model = calibrated(**FP8)
    (tmp_path/"kept").write_text("mine")
    for path in (tmp_path, tmp_path/"kept"):
        with pytest.raises(ValueError, match="exists and is not an empty folder; choose another"): save_quantized(model, path)
    assert (tmp_path/"kept").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_only_a_calibrated_model_of_transformers_has_a_checkpoint(tmp_path):
    model, modifier = make_model("llama_gqa"), QuantizationModifier(**FP8)
    with pytest.raises(LifecycleError, match="cannot save a model that is original; calibrate it first"): save_quantized(model, tmp_path/"x")
    modifier.initialize_quantization(model)
    with pytest.raises(LifecycleError, match="cannot save a model that is initialized"): save_quantized(model, tmp_path/"x")
    assert phase_of(model) == "initialized" and recipe_of(model).resolved_config == modifier.resolved_config
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"): save_quantized("gpt2", tmp_path/"x")
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    calibrate(net, [torch.ones(2, 8)], QuantizationModifier(scheme="FP8"), progress=False)
    with pytest.raises(ValueError, match="a Sequential has no checkpoint format, only models of transformers do"): save_quantized(net, tmp_path/"x")
    assert to_config(net)["config_groups"]["group_0"]["format"] == "float-quantized"
    plain_model = make_model("llama_gqa")
    with pytest.warns(UserWarning, match="quantizes nothing"):
        calibrate(plain_model, None, QuantizationModifier(scheme="UNQUANTIZED"), progress=False)
    with pytest.raises(ValueError, match="nothing of this model is quantized"): save_quantized(plain_model, tmp_path/"x")
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_that_has_no_format_that_loads(tmp_path):
    model = calibrated(scheme={"NVFP4A16": ["Embedding"]})
    with pytest.raises(ValueError, match=r"model.embed_tokens: weights of fp4, .* cannot be stored as naive-quantized"):
        save_quantized(model, tmp_path/"x")


def test_a_recipe_is_independent_of_the_model_it_came_from():
    model = calibrated(**FP8)
    recipe = recipe_of(model)
    before = deepcopy(recipe.resolved_config)
    reset_quantization(model)
    assert recipe.resolved_config == before == QuantizationModifier(**FP8).resolved_config


# --- mixtures of experts ---

INT4_WEIGHTS = dict(config_groups={"g": QuantizationScheme(
    targets=["Linear"], weights=dict(num_bits=4, type="int", strategy="group", group_size=32))})


def saved_mixture(name, recipe, folder):
    "A calibrated mixture of experts, saved; its logits, and what was warned of while saving."
    model = make_model(name)
    calibrate(model, make_batches(), QuantizationModifier(**recipe, ignore=["lm_head"]), progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_quantized(model, folder)
    return model, outputs(model, make_batches(1)[0]), [str(w.message) for w in caught if "experts" in str(w.message)]


@pytest.mark.slow
def test_experts_are_stored_under_the_names_of_the_hub_and_load_with_the_same_logits(tmp_path):
    model, expected, warned = saved_mixture("mixtral", INT4_WEIGHTS, tmp_path/"x")
    names = {n for n in load_file(tmp_path/"x"/"model.safetensors") if ".experts." in n}
    assert names == {f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight_{part}"
                     for i in range(2) for e in range(4) for w in ("w1", "w2", "w3") for part in ("packed", "scale", "shape")} and not warned
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path/"x"), make_batches(1)[0]), expected)
    before = fingerprint(make_model("mixtral"))
    reset_quantization(model)
    assert fingerprint(model).keys() == before.keys()


def test_what_transformers_will_not_do_for_experts_is_said(tmp_path):
    _, _, warned = saved_mixture("mixtral", dict(scheme="FP8"), tmp_path/"x")
    assert len(warned) == 1 and "no place for scales of what enters them" in warned[0]
