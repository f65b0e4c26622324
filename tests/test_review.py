"""What somebody who tried to break the engine found, kept so that it stays mended."""
import gc
import os
import threading

import accelerate
import pytest
import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from helpers import differences, fingerprint, make_batches, make_model, offload, outputs, qparams
from transformers import AutoModelForSeq2SeqLM, BartConfig, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from qcal_nb.calibration import ModelBusyError, update_qparams
from qcal_nb.lifecycle import QuantizationModifier, State, phase_of, reset_quantization, unfuse_experts
from qcal_nb.observers.base import Observer
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import override, save_quantized

KV = dict(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
STATIC = dict(scheme="INT8_STATIC", ignore=["lm_head"])


@pytest.mark.parametrize("when", ["weights are searched", "the calibration starts"])
def test_nobody_else_is_heard_while_calibrate_is_at_work(when, monkeypatch):
    "Another thread's forward, in the moments before the first batch and after the last."
    model, plain, refused = make_model("llama_gqa"), make_model("llama_gqa"), []
    loud = {"input_ids": torch.full((1, 8), 3)}
    def elsewhere():
        def run():
            try: model(**loud)
            except ModelBusyError as error: refused.append(str(error))
        thread = threading.Thread(target=run)
        thread.start(); thread.join()
    name = "on_start" if when == "the calibration starts" else "sync_obs_act_stats"
    original = getattr(QuantizationModifier, name)
    def interfered(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if getattr(interfered, "armed", False): elsewhere()
        return result
    monkeypatch.setattr(QuantizationModifier, name, interfered)
    calibrate(plain, make_batches(), QuantizationModifier(**STATIC), progress=False)
    interfered.armed = True
    modifier = QuantizationModifier(**STATIC)
    calibrate(model, make_batches(), modifier, progress=False)
    assert all(torch.equal(v, qparams(model)[k]) for k, v in qparams(plain).items())
    assert {r.observations for r in modifier.coverage if r.base_name == "input"} == {3}


def test_the_sequential_pipeline_is_closed_below_the_model():
    model, errors = make_model("llama_gqa"), []
    def elsewhere(*_):
        def run():
            for part in (model.model, model.model.layers[0]):
                try: part(torch.zeros(1, 4, 64) if part is not model.model else torch.ones(1, 4, dtype=torch.long))
                except BaseException as error: errors.append(type(error))
        thread = threading.Thread(target=run)
        thread.start(); thread.join()
    handle = model.model.layers[1].register_forward_pre_hook(elsewhere)
    calibrate(model, make_batches(), QuantizationModifier(**STATIC), pipeline="sequential", progress=False)
    handle.remove()
    assert errors and set(errors) == {ModelBusyError}


def stored(folder): return sorted((f, os.path.getsize(os.path.join(folder, f))) for f in os.listdir(folder))


@pytest.mark.parametrize("recipe", [
    dict(scheme="FP8", ignore=["lm_head"]), dict(scheme="FP8", ignore=["lm_head", "re:.*experts.*"])], ids=["apart", "fused"])
def test_a_mixture_on_disk_leaves_no_files_behind(recipe, tmp_path):
    model = offload(make_model("mixtral"), "disk", tmp_path)
    before, exact = stored(tmp_path), outputs(model, make_batches()[0])
    forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules() if "experts" in n}
    for _ in range(2):
        calibrate(model, make_batches(), QuantizationModifier(**recipe), progress=False)
        reset_quantization(model)
        gc.collect()
    assert stored(tmp_path) == before and torch.equal(outputs(model, make_batches()[0]), exact)
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules() if "experts" in n} == forwards


def test_experts_that_accelerate_keeps_on_disk_are_quantized(tmp_path):
    model = make_model("mixtral")
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    exact = outputs(model, make_batches()[0])
    calibrate(model, make_batches(), QuantizationModifier(**STATIC), progress=False)
    assert sum(n.endswith("weight_scale") and ".experts." in n for n in qparams(model)) == 2 * 4 * 3
    reset_quantization(model)
    assert torch.equal(outputs(model, make_batches()[0]), exact) and hasattr(model.lm_head, "_hf_hook")


def test_a_new_weight_at_the_old_address_is_looked_at():
    args = QuantizationArgs(num_bits=8, strategy="tensor")
    for _ in range(20):
        observer, weight = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args), torch.randn(16, 16)
        observer(weight)
        del weight
        new = torch.randn(16, 16)
        assert observer(new).max_vals.item() == new.max().item()


def test_an_offloaded_weight_that_changed_is_looked_at(tmp_path):
    model = offload(make_model("llama_gqa"), "disk", tmp_path)
    modifier = QuantizationModifier(scheme="W8A8", ignore=["lm_head"])
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    layer = model.model.layers[0].mlp.up_proj
    for factor in (2.0, 3.0, 4.0):
        layer.weight_observer(layer.weight)
        update_offload_parameter(layer, "weight", layer.weight * factor)
        assert torch.equal(layer.weight_observer(layer.weight).max_vals, layer.weight.amax(1, keepdim=True))


def test_two_models_with_one_config_are_kept_apart():
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    recipe = dict(config_groups={"a": QuantizationScheme(targets=["re:.*self_attn$"], input_activations=KV)})
    calibrate(first, make_batches(), QuantizationModifier(**recipe), progress=False)
    before, expected = fingerprint(second), outputs(first, make_batches()[0])
    with pytest.raises(ValueError, match="shares this config object has its attention hooked"):
        QuantizationModifier(**recipe).initialize_quantization(second)
    assert differences(before, fingerprint(second)) == [] and torch.equal(outputs(first, make_batches()[0]), expected)


def test_a_cache_of_two_parts_is_refused():
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128)).eval()
    with pytest.raises(ValueError, match="an encoder-decoder has a cache of two parts"):
        QuantizationModifier(kv_cache_scheme=KV, targets=[]).initialize_quantization(model)


def test_heads_that_share_one_latent_have_no_scales_of_their_own():
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32,
        kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=1, n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, moe_intermediate_size=64)).eval()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="use strategy 'tensor'"):
        calibrate(model, make_batches(), QuantizationModifier(kv_cache_scheme=KV | dict(strategy="attn_head"), targets=[]), progress=False)
    assert phase_of(model) == "calibrating" and all(v.isnan().all() for k, v in qparams(model).items() if k.endswith("scale"))
    reset_quantization(model)
    assert differences(before, fingerprint(model)) == []


@pytest.mark.slow
def test_an_encoder_decoder_whose_head_is_quantized_keeps_its_embeddings(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128)).eval()
    data = [dict(b, decoder_input_ids=b["input_ids"]) for b in make_batches()]
    calibrate(model, data, QuantizationModifier(scheme="FP8"), progress=False)
    expected = outputs(model, data[0])
    save_quantized(model, tmp_path/"x")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path/"x")
    torch.testing.assert_close(outputs(loaded, data[0]), expected, rtol=0, atol=0)


def test_tokens_of_experts_are_counted_anew_for_each_calibration():
    model, found = make_model("mixtral"), []
    unfuse_experts(model)
    for _ in range(2):
        modifier = QuantizationModifier(**STATIC)
        calibrate(model, make_batches(), modifier, progress=False)
        found.append([r.expert_tokens for r in modifier.coverage])
    assert found[0] == found[1]


def test_the_head_sees_what_quantized_blocks_return():
    "Handed on quantized, the last block's output differs from the float one, and so does the head's input scale."
    found = []
    for propagate in ("float", "quantized"):
        model = make_model("llama_gqa")
        calibrate(model, make_batches(), QuantizationModifier(scheme=dict(weights=dict(num_bits=4, strategy="channel"), input_activations=dict(
            num_bits=8, strategy="tensor", observer="static_minmax"))), pipeline="sequential", propagate=propagate, progress=False)
        found.append(qparams(model)["lm_head.input_scale"])
    seen = []
    model.lm_head.register_forward_pre_hook(lambda m, a: seen.append(a[0].abs().max()))
    with torch.no_grad():
        for batch in make_batches(): model(**batch)
    assert found[0] != found[1]
    torch.testing.assert_close(found[1], torch.stack(seen).max().reshape(1) / 127.5, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("work", "error", "words"), [
    (lambda model: calibrate(model, make_batches(), QuantizationModifier(**STATIC), all_experts="no"), TypeError,
     "all_experts='no' must be True or False"),
    (lambda model: QuantizationModifier(**STATIC).on_initialize(model), TypeError, "state must be a State, got LlamaForCausalLM"),
    (lambda model: QuantizationModifier(config_groups={"g": dict(targets=["re:("], weights=dict(num_bits=8))}), ValueError,
     "is not a regular expression"),
])
def test_words_for_what_people_do(work, error, words):
    model = make_model("llama_gqa")
    before = fingerprint(model)
    with pytest.raises(error) as caught: work(model)
    assert words in str(caught.value) and differences(before, fingerprint(model)) == []


def test_statistics_that_came_after_the_reading_are_not_consumed():
    "q is read, looked at again, and then k and v are read: what q saw last was not written and is not consumed."
    model = make_model("llama_gqa")
    modifier = QuantizationModifier(scheme="NVFP4A16", ignore=["lm_head"])
    modifier.on_initialize(State(model)); modifier.on_start(State(model))
    q, k, v = (getattr(model.model.layers[0].self_attn, f"{n}_proj") for n in "qkv")
    for layer in (q, k, v): layer.weight_observer(layer.weight)
    update_qparams(q, "weight")
    with torch.no_grad(): q.weight.mul_(2)
    q.weight_observer(q.weight)
    update_qparams([k, v], "weight")
    assert not q.weight_observer.consumed
    update_qparams(q, "weight")
    assert q.weight_observer.consumed


def test_an_observer_needs_arguments():
    for args in (None, dict(num_bits=8)):
        with pytest.raises(TypeError, match="args must be QuantizationArgs, got"): Observer.load_from_registry("minmax", base_name="input", args=args)


G = dict(num_bits=4, type="int", strategy="group", group_size=32)


@pytest.mark.parametrize("recipe", [
    dict(config_groups={"a": dict(targets=["re:.*experts.*down_proj"], weights=G | dict(num_bits=8)), "b": dict(targets=["Linear"], weights=G)}),
    dict(config_groups={"a": dict(targets=["Linear"], weights=G)}, ignore=["lm_head", "re:.*experts.1.*"]),
])
def test_experts_in_several_ways_are_not_saved(recipe, tmp_path):
    "Loaded, they would be stacked, and become NaN or another expert without a word."
    model = make_model("mixtral")
    calibrate(model, make_batches(), QuantizationModifier(**{"ignore": ["lm_head"]} | recipe), progress=False)
    with pytest.raises(ValueError, match=r"the experts in model.layers.0.mlp.experts are quantized in 2 ways"): save_quantized(model, tmp_path/"x")
    assert not (tmp_path/"x").exists()


def test_an_observer_that_nobody_asks_is_announced():
    with pytest.warns(UserWarning, match="observer 'percentile' has no effect"):
        QuantizationModifier(scheme="FP8_DYNAMIC", input_observer="percentile")


@pytest.mark.parametrize(("observers", "error", "words"), [
    ({"model.layers.0.self_attn": {"k": "minmax"}}, ValueError, "is an attention module; its observer is named in kv_cache_scheme"),
    ({"model.layers.0.mlp.experts.0.down_proj": {"weight": "mse"}}, ValueError, "its experts are fused, see unfuse_experts"),
    ({"model.layers.0.self_attn.q_proj": "mse"}, TypeError, "must map 'weight', 'input' or 'output' to an observer, got 'mse'"),
])
def test_overrides_that_cannot_be(observers, error, words):
    modifier = QuantizationModifier(scheme="FP8", kv_cache_scheme=KV, ignore=["lm_head"])
    with pytest.raises(error) as caught: override(modifier, observers, make_model("mixtral"))
    assert words in str(caught.value)
