"""A checkpoint gives the logits that it was saved from, for every preset, scheme and architecture."""
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from helpers import differences, fingerprint, make_batches, make_model, offload, outputs
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from qcal_nb.lifecycle import QuantizationModifier, reset_quantization
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import from_config, recipe_of, save_quantized
from qcal_nb.schemes import preset_names
from tests.recipes.samples import FP8, INT8, KV, UP, calibrated, saved, saved_mixture, state_of


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
    with pytest.warns(UserWarning, match=r"unpacks .* to torch.bfloat16, but this model is torch.float32"):
        a, b, unfit = saved(model, tmp_path/"x")
    assert b.dtype == torch.bfloat16 and not torch.equal(a, b.float()) and unfit == {}


def group(**parts): return dict(config_groups={"g": dict(targets=["Linear"], **parts)}, ignore=["lm_head"])


CASES = {
    "head too, untied": dict(scheme="FP8"),
    "embedding of eight bits": dict(scheme={"W8A16": ["Embedding"], "FP8": ["Linear"]}),
    "embedding of four bits": dict(scheme={"W4A16": ["Linear", "Embedding"]}),
    "asymmetric inputs": group(
        weights=dict(INT8, strategy="tensor"), input_activations=dict(INT8, symmetric=False, strategy="tensor")
    ),
    "asymmetric channels": group(
        weights=dict(INT8, strategy="channel", symmetric=False), input_activations=dict(INT8, strategy="tensor")
    ),
    "asymmetric groups": group(weights=dict(num_bits=4, strategy="group", group_size=32, symmetric=False)),
    "outputs": group(
        weights=dict(INT8, strategy="tensor"), output_activations=dict(INT8, strategy="tensor", symmetric=False)
    ),
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
    # one scheme, two formats
    if case == "embedding of four bits": assert loaded.pop("group_0_naive-quantized").targets == ["model.embed_tokens"]
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
    class Mine(torch.nn.Linear):
        "Compressed-tensors 0.19 would store its float weight, and quantize it no more when it is loaded."
    model = make_model("llama_gqa")
    model.model.layers[0].mlp.up_proj.__class__ = Mine
    calibrate(model, make_batches(), QuantizationModifier(**FP8), progress=False)
    a, b, unfit = saved(model, tmp_path/"x")
    assert torch.equal(a, b) and unfit == {}
    assert load_file(tmp_path/"x"/"model.safetensors")[f"{UP}.weight"].dtype == torch.float8_e4m3fn


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


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model_is_saved_as_it_would_be_otherwise(kind, tmp_path):
    recipe, files = dict(scheme="FP8", ignore=["lm_head"]), []
    for where in ("not", kind):
        model = make_model("llama_gqa")
        if where != "not": offload(model, kind, tmp_path/"offload")
        calibrate(model, make_batches(), QuantizationModifier(**recipe), progress=False)
        files.append((save_quantized(model, tmp_path/where)/"model.safetensors").read_bytes())
    assert files[0] == files[1]


INT4_WEIGHTS = dict(config_groups={"g": QuantizationScheme(
    targets=["Linear"], weights=dict(num_bits=4, type="int", strategy="group", group_size=32))})


@pytest.mark.slow
def test_experts_are_stored_under_the_names_of_the_hub_and_load_with_the_same_logits(tmp_path):
    model, expected, warned = saved_mixture("mixtral", INT4_WEIGHTS, tmp_path/"x")
    names = {n for n in load_file(tmp_path/"x"/"model.safetensors") if ".experts." in n}
    assert names == {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}.weight_{part}"
        for i in range(2) for e in range(4) for w in ("w1", "w2", "w3") for part in ("packed", "scale", "shape")
    }
    assert not warned
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path/"x"), make_batches(1)[0]), expected)
    before = fingerprint(make_model("mixtral"))
    reset_quantization(model)
    assert fingerprint(model).keys() == before.keys()
