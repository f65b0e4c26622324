"""Caches and heads that cannot have the scales that were asked for."""
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from helpers import differences, fingerprint, make_batches, outputs
from transformers import (
    AutoModelForSeq2SeqLM, BartConfig, DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM
)

from qcal_nb.lifecycle import QuantizationModifier, phase_of
from qcal_nb.pipelines import calibrate

KV = dict(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)


def test_two_models_with_one_config_are_kept_apart():
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2
    )
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
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128)).eval()
    with pytest.raises(ValueError, match="an encoder-decoder has a cache of two parts"):
        QuantizationModifier(kv_cache_scheme=KV, targets=[]).initialize_quantization(model)


def test_heads_that_share_one_latent_have_no_scales_of_their_own():
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=32,
        kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=1,
        n_routed_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2, moe_intermediate_size=64)).eval()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="use strategy 'tensor'"):
        calibrate(
            model,
            make_batches(),
            QuantizationModifier(kv_cache_scheme=KV | dict(strategy="attn_head"), targets=[]),
            progress=False,
        )
    assert phase_of(model) == "original"    # two tokens show it, before the data
    assert differences(before, fingerprint(model)) == []
