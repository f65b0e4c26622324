"""Keys, values and queries: found, observed, quantized and given back, on models that can be hooked and on those that
cannot."""
from copy import deepcopy

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import differences, fingerprint, make_batches, make_model, outputs, qparams

from qcal_nb.modeling.attention import HOOKED
from qcal_nb.modeling import attention_modules
from qcal_nb.calibration import (
    calibrate_kv_cache_input_hook,
    calibrate_kv_cache_output_hook,
    freeze_module_quantization,
    initialize_quantized_kv_cache,
)
from qcal_nb.lifecycle import QuantizationModifier, State, match_report, phase_of, reset_quantization
from qcal_nb.pipelines import calibrate, calibration_context

KV = dict(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
CACHED = ["llama_gqa", "qwen3", "gemma2", "opt", "phi", "mixtral"]
UNCACHED = {"gpt_neox": "GPTNeoXAttention", "gpt2": "GPT2Attention", "bert": "BertAttention, BertSelfAttention"}


def attention_recipe(**args):
    return dict(
        config_groups={"attention": QuantizationScheme(targets=["re:.*self_attn$"], input_activations=KV | args)}
    )


def states(model, batches, which):
    """The largest |value| of each attention module's query, key or value, by a plain hook where the module calls for
    attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    found, position = {}, dict(q=0, k=1, v=2)[which]
    eager = {
        type(m): __import__(type(m).__module__, fromlist=["x"]).eager_attention_forward
        for m in attention_modules(model).values()
    }
    def look(module, *args, **kwargs):
        name = next(n for n, m in attention_modules(model).items() if m is module)
        found.setdefault(name, []).append(args[position].abs().amax(dim=(0, 2, 3)))
        return eager[type(module)](module, *args, **kwargs)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register("looking", look)
    ALL_MASK_ATTENTION_FUNCTIONS.register("looking", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    before = model.config._attn_implementation
    model.config._attn_implementation_internal = "looking"
    with torch.no_grad():
        for batch in batches: model(**batch, use_cache=False)
    model.config._attn_implementation_internal = before
    return {name: torch.stack(values).amax(0) for name, values in found.items()}


@pytest.mark.parametrize("name", CACHED)
def test_scales_of_heads_are_those_of_a_plain_loop(name):
    """Queries, keys and values after rotary embedding, one scale a head, against another way to look at the same
    tensors."""
    model, data = make_model(name), make_batches()
    calibrate(
        model,
        data,
        QuantizationModifier(**attention_recipe(strategy="attn_head", observer="static_minmax")),
        progress=False,
    )
    for which in "qkv":
        for path, largest in states(make_model(name), data, which).items():
            scale = getattr(model.get_submodule(path), f"{which}_scale")
            torch.testing.assert_close(scale.flatten() * 448, largest, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("recipe", [
    dict(kv_cache_scheme=KV, targets=[]), dict(kv_cache_scheme=KV, scheme="FP8", ignore=["lm_head"]),
    attention_recipe(),
], ids=["cache", "cache and FP8", "attention"])
@pytest.mark.parametrize("name", CACHED)
def test_quantized_and_given_back(name, recipe, implementation):
    model, data = make_model(name), make_batches()
    model.set_attn_implementation(implementation)
    before, exact = fingerprint(model), outputs(model, data[0])
    calibrate(model, data, QuantizationModifier(**recipe), progress=False)
    assert all(v.float().isfinite().all() for v in qparams(model).values())
    assert not torch.equal(outputs(model, data[0]), exact)
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == [] and torch.equal(outputs(model, data[0]), exact)


def test_only_the_cache_is_quantized_by_a_cache_scheme():
    "The same numbers as quantizing keys and values by hand, in a generation with a real cache."
    model, data = make_model("llama_gqa"), make_batches()
    calibrate(model, data, QuantizationModifier(kv_cache_scheme=KV, targets=[]), progress=False)
    ids = data[0]["input_ids"][:1, :8]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        first = model(input_ids=ids[:, :7], use_cache=True)
        last = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)
    assert not hasattr(model.model.layers[0].self_attn, "q_scale")


@pytest.mark.parametrize(("name", "classes"), UNCACHED.items())
def test_where_nothing_can_be_hooked_the_error_names_what_was_found(name, classes):
    model = make_model(name)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="no attention module whose cache can be hooked") as caught:
        QuantizationModifier(scheme="FP8", kv_cache_scheme=KV).initialize_quantization(model)
    assert classes.split(",")[0] in str(caught.value) and differences(before, fingerprint(model)) == []


@pytest.mark.parametrize(("recipe", "words"), [
    (
        attention_recipe()
        | dict(config_groups={"a": QuantizationScheme(targets=["LlamaAttention"], input_activations=KV, weights=KV)}),
        "attention takes input_activations and nothing else",
    ),
    (dict(kv_cache_scheme=KV | dict(strategy="group", group_size=8, type="int", dynamic=True), targets=[]), None),
    (
        dict(kv_cache_scheme=KV | dict(strategy="channel"), targets=[]),
        "kv_cache_scheme has strategy 'channel'; keys and values take 'tensor' or",
    ),
])
def test_schemes_that_attention_cannot_have(recipe, words):
    model = make_model("llama_gqa")
    before = fingerprint(model)
    try: QuantizationModifier(**recipe).initialize_quantization(model)
    except ValueError as error: assert words and words in str(error)
    else: assert words is None and phase_of(model) == "initialized"
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == []


def test_an_ignored_attention_module_is_left_alone():
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(kv_cache_scheme=KV, targets=[], ignore=["model.layers.0.self_attn"])
    calibrate(model, make_batches(), modifier, progress=False)
    assert {n.rpartition(".")[0] for n in qparams(model)} == {"model.layers.1.self_attn"}
    rows = {r.module: r for r in match_report(model, modifier) if r.type == "LlamaAttention"}
    assert not rows["model.layers.0.self_attn"].matched
    assert rows["model.layers.1.self_attn"].reason == "kv_cache_scheme: keys and values"


def test_two_models_with_different_attention_do_not_disturb_each_other():
    models, data = {}, make_batches()
    for implementation in ("sdpa", "eager"):
        models[implementation] = make_model("llama_gqa", seed=len(models))
        models[implementation].set_attn_implementation(implementation)
    exact, recipe = {k: outputs(m, data[0]) for k, m in models.items()}, attention_recipe()
    alone = {}
    for k, model in models.items():
        calibrate(model, data, QuantizationModifier(**recipe), progress=False)
        alone[k] = outputs(model, data[0])
        reset_quantization(model)
    for model in models.values(): calibrate(model, data, QuantizationModifier(**recipe), progress=False)
    assert all(torch.equal(outputs(m, data[0]), alone[k]) for k, m in models.items())
    assert {m.config._attn_implementation for m in models.values()} == {HOOKED + "sdpa", HOOKED + "eager"}
    reset_quantization(models["sdpa"])
    assert torch.equal(outputs(models["eager"], data[0]), alone["eager"])
    assert torch.equal(outputs(models["sdpa"], data[0]), exact["sdpa"])


def test_a_copy_quantizes_with_its_own_scales():
    model, data = make_model("llama_gqa"), make_batches()
    calibrate(model, data, QuantizationModifier(**attention_recipe()), progress=False)
    expected, twin = outputs(model, data[0]), deepcopy(model)
    with torch.no_grad():
        for m in attention_modules(twin).values(): m.k_scale.mul_(100)
    assert torch.equal(outputs(model, data[0]), expected) and not torch.equal(outputs(twin, data[0]), expected)
    reset_quantization(twin)
    assert torch.equal(outputs(model, data[0]), expected)


def test_while_calibrating_attention_is_eager_beneath_the_hook():
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(**attention_recipe())
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    with calibration_context(model): assert model.config._attn_implementation == HOOKED + "eager"
    with calibration_context(model, attention="model"): assert model.config._attn_implementation == HOOKED + "sdpa"


def test_an_exception_inside_attention_leaves_nothing_behind():
    model, data = make_model("llama_gqa"), make_batches()
    before = fingerprint(model)
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(model, data, QuantizationModifier(**attention_recipe()), progress=False)
    handle.remove()
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("part", ["input_activations", "output_activations"])
@pytest.mark.parametrize("name", ["llama_gqa", "opt", "phi"])
def test_the_immediate_mode_cache(name, part):
    """The hooks of the earlier generation, on transformers' own attention: scales are those of a plain loop; freeze
    removes the cache."""
    model, data = make_model(name), make_batches()
    largest = {which: states(make_model(name), data, which) for which in "kv"}
    model.set_attn_implementation("eager")
    args = QuantizationArgs(**KV, observer="static_minmax")
    for m in attention_modules(model).values():
        m.quantization_scheme = QuantizationScheme(targets=["x"], **{part: args})
        initialize_quantized_kv_cache(m); cache = m.kv_cache
        initialize_quantized_kv_cache(m)
        assert m.kv_cache is cache
        m.register_forward_pre_hook(calibrate_kv_cache_input_hook, with_kwargs=True)
        m.register_forward_hook(calibrate_kv_cache_output_hook)
    with torch.no_grad():
        for batch in data: model(**batch)
    for path, m in attention_modules(model).items():
        for which in "kv":
            torch.testing.assert_close(
                getattr(m, f"{which}_scale"), largest[which][path].max().reshape(1) / 448, rtol=1e-5, atol=0
            )
        freeze_module_quantization(m)
        assert not hasattr(m, "kv_cache") and not hasattr(m, "k_observer") and m.quantization_status == "frozen"


def test_a_cache_without_a_scheme_is_not_made():
    attention = make_model("llama_gqa").model.layers[0].self_attn
    initialize_quantized_kv_cache(attention)
    assert not hasattr(attention, "kv_cache")
