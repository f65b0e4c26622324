"""What several tests of recipes and checkpoints need."""
import json
import warnings

import torch
from helpers import differences, fingerprint, make_batches, make_model, outputs
from hypothesis import reject
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.models import load_tiny_llama
from qcal_nb.observers import Registry, find_observer
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import save_quantized
from qcal_nb.schemes import preset, preset_names

INT8 = dict(num_bits=8, type="int")
FP8 = dict(scheme="FP8", ignore=["lm_head"])
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def observers():
    "Names of observers, with arguments that differ from their defaults where we know a range."
    def kwargs(name):
        knows = "averaging_constant" in find_observer(name).defaults
        return (
            st.fixed_dictionaries({}, optional={"averaging_constant": st.floats(0.01, 1.0)}) if knows else st.just({})
        )
    known = [name for name in Registry.registered_names() if not find_observer(name).needs_gradients]
    return st.sampled_from(known).flatmap(lambda name: st.tuples(st.just(name), kwargs(name)))


TARGETS = st.lists(
    st.sampled_from(["Linear", "re:.*mlp.*", "lm_head", UP, "re:.*[qk]_proj$"]), min_size=1, max_size=3, unique=True
)
IGNORE = st.lists(st.sampled_from(["lm_head", "re:.*down_proj", DOWN]), max_size=2, unique=True)
POLICIES = st.fixed_dictionaries(
    {},
    optional=dict(
        nonfinite=st.sampled_from(["skip", "record"]), on_uncalibrated=st.just("skip"),
        bypass_divisibility_checks=st.just(True)
    ),
)


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
    if form == "presets":
        fields["scheme"] = draw(st.dictionaries(st.sampled_from(preset_names()), targets, min_size=1, max_size=3))
    if form == "scheme": fields["scheme"] = draw(schemes(targets))
    if form == "fields": fields["scheme"] = draw(schemes(targets)).model_dump(exclude={"targets"})
    if form == "groups":
        fields["config_groups"] = {f"group_{i}": draw(schemes(targets)) for i in range(draw(st.integers(1, 3)))}
    if form in ("preset", "presets") and draw(st.booleans()):
        name = draw(st.sampled_from(["static_minmax", "minmax", "MINMAX", "memoryless-minmax"]))
        fields |= draw(st.sampled_from(
            [dict(input_observer=name), dict(observer=dict(input=name)), dict(weight_observer="memoryless_minmax")]
        ))
    return QuantizationModifier(**fields)


def plain(config): return json.loads(config.model_dump_json()) | dict(quantization_status="")


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


KV = dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)


def saved_mixture(name, recipe, folder):
    "A calibrated mixture of experts, saved; its logits, and what was warned of while saving."
    model = make_model(name)
    calibrate(model, make_batches(), QuantizationModifier(**recipe, ignore=["lm_head"]), progress=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_quantized(model, folder)
    return model, outputs(model, make_batches(1)[0]), [str(w.message) for w in caught if "experts" in str(w.message)]
