"""Experts quantized in several ways are not saved; an encoder-decoder keeps its embeddings."""
import pytest
import torch
from helpers import make_batches, make_model, outputs
from transformers import AutoModelForSeq2SeqLM, BartConfig

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import save_quantized


@pytest.mark.slow
def test_an_encoder_decoder_whose_head_is_quantized_keeps_its_embeddings(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128)).eval()
    data = [dict(b, decoder_input_ids=b["input_ids"]) for b in make_batches()]
    calibrate(model, data, QuantizationModifier(scheme="FP8"), progress=False)
    expected = outputs(model, data[0])
    save_quantized(model, tmp_path/"x")
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path/"x")
    torch.testing.assert_close(outputs(loaded, data[0]), expected, rtol=0, atol=0)


G = dict(num_bits=4, type="int", strategy="group", group_size=32)


@pytest.mark.parametrize("recipe", [
    dict(config_groups={
        "a": dict(targets=["re:.*experts.*down_proj"], weights=G | dict(num_bits=8)),
        "b": dict(targets=["Linear"], weights=G),
    }),
    dict(config_groups={"a": dict(targets=["Linear"], weights=G)}, ignore=["lm_head", "re:.*experts.1.*"]),
])
def test_experts_in_several_ways_are_not_saved(recipe, tmp_path):
    "Loaded, they would be stacked, and become NaN or another expert without a word."
    model = make_model("mixtral")
    calibrate(model, make_batches(), QuantizationModifier(**{"ignore": ["lm_head"]} | recipe), progress=False)
    with pytest.raises(ValueError, match=r"the experts in model.layers.0.mlp.experts are quantized in 2 ways"):
        save_quantized(model, tmp_path/"x")
    assert not (tmp_path/"x").exists()
