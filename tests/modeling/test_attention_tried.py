"""Caches that compressed-tensors' stand-in cannot replace are refused in words, before any data runs."""
import pytest
import torch
import transformers
from helpers import differences, fingerprint, make_batches

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import check_savable

WIDE = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
LATENT = WIDE | dict(
    num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16,
    n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=64,
)
INDEX = dict(index_topk=4, index_head_dim=32, index_n_heads=2)
TWO_KINDS = WIDE | dict(num_key_value_heads=2, head_dim=16)
MODELS = dict(
    Gemma4Text=("Gemma4ForCausalLM", TWO_KINDS | dict(
        global_head_dim=32, num_global_key_value_heads=1, layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0, num_kv_shared_layers=0)),
    DeepseekV32=("DeepseekV32ForCausalLM", LATENT | INDEX | dict(first_k_dense_replace=2)),
    GlmMoeDsa=("GlmMoeDsaForCausalLM", LATENT | INDEX | dict(mlp_layer_types=["dense", "dense"])),
    MiniMax=("MiniMaxForCausalLM", TWO_KINDS | dict(
        num_local_experts=2, num_experts_per_tok=1, layer_types=["linear_attention", "full_attention"], block_size=4)),
    DeepseekV3=("DeepseekV3ForCausalLM", LATENT | dict(first_k_dense_replace=2)),
    Llama=("LlamaForCausalLM", WIDE | dict(num_key_value_heads=2)),
    Qwen3Next=("Qwen3NextForCausalLM", TWO_KINDS | dict(
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"])),
)
CACHE = dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    cls, options = MODELS[name]
    return getattr(transformers, cls)(getattr(transformers, f"{name}Config")(**options)).eval()


def refused(model: torch.nn.Module, words: str, pipeline: str = "basic", **cache) -> None:
    before = fingerprint(model)
    calls = []
    handle = model.model.register_forward_hook(lambda _, args, output: calls.append(output[0].shape[1]))
    modifier = QuantizationModifier(kv_cache_scheme=CACHE | cache)
    with pytest.raises(ValueError, match=words):
        calibrate(model, make_batches(2, 64, (1, 8)), modifier, pipeline=pipeline, progress=False)
    handle.remove()
    assert set(calls) <= {2}        # the trial's two tokens, and none of the data
    assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("pipeline", ["basic", "sequential"])
@pytest.mark.parametrize("name, words", [
    ("Gemma4Text", "heads of different sizes"),
    ("DeepseekV32", "with its cache hooked.*update_indexer.*Leave them as they are"),
    ("GlmMoeDsa", "with its cache hooked.*update_indexer"),
    ("MiniMax", "with its cache hooked.*get_linear_cache"),
])
def test_caches_that_cannot_be_replaced(name, words, pipeline):
    refused(make(name), words, pipeline)


@pytest.mark.parametrize("pipeline", ["basic", "sequential"])
def test_heads_that_share_one_latent(pipeline):
    "Block by block, the one scale was written for all heads; by whole passes the error came after the data."
    refused(make("DeepseekV3"), "k: the config promises 4 heads, the cache has 1", pipeline, strategy="attn_head")


@pytest.mark.parametrize("name, strategy", [
    ("DeepseekV3", "tensor"), ("Llama", "attn_head"), ("Qwen3Next", "attn_head"), ("Qwen3Next", "tensor")
])
def test_what_works_still_works(name, strategy):
    model = make(name)
    modifier = QuantizationModifier(kv_cache_scheme=CACHE | dict(strategy=strategy))
    calibrate(model, make_batches(1, 64, (1, 8)), modifier, progress=False)
    scales = {n: p for n, p in model.named_parameters() if n.endswith(("k_scale", "v_scale"))}
    assert scales and all(p.isfinite().all() for p in scales.values())


def vision() -> torch.nn.Module:
    text = WIDE | dict(intermediate_size_mlp=64, num_key_value_heads=2, head_dim=16, num_local_experts=2)
    eye = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, vision_output_dim=64,
        image_size=28, patch_size=14, projector_input_dim=64, projector_output_dim=64,
    )
    config = transformers.Llama4Config(text_config=text | dict(attn_temperature_tuning=False), vision_config=eye)
    return transformers.Llama4ForConditionalGeneration(config).eval()


def test_a_vision_tower_without_images_is_not_told_to_ignore_it():
    "Ignoring it would end in a checkpoint that cannot be saved, and that is said before the data, too."
    model = vision()
    modifier = QuantizationModifier(kv_cache_scheme=CACHE)
    with pytest.raises(ValueError, match="Feed data that reaches them .images.*on_uncalibrated='skip'") as told:
        calibrate(model, make_batches(1, 64, (1, 8)), modifier, progress=False)
    assert "`ignore`" not in str(told.value)
    left_out = QuantizationModifier(kv_cache_scheme=CACHE, ignore=["re:.*vision.*"])
    with pytest.raises(ValueError, match="1 of 3 attention modules have no scales"): check_savable(vision(), left_out)
