"""Modules that are called with more than one tensor lose the rest when they are wrapped: refused before that."""
import pytest
import torch
from helpers import differences, fingerprint, make_batches
from transformers import BartConfig, BartForConditionalGeneration, OPTConfig, OPTForCausalLM
from transformers import WhisperConfig, WhisperForConditionalGeneration

from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.records import record

SMALL = dict(vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
             decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
SCHEME = dict(weights=dict(num_bits=8, type="int", strategy="channel"))


def opt():
    return OPTForCausalLM(OPTConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, ffn_dim=32,
                                    num_attention_heads=2, word_embed_proj_dim=32))


MODELS = dict(
    opt=opt,
    bart=lambda: BartForConditionalGeneration(BartConfig(**SMALL)),
    whisper=lambda: WhisperForConditionalGeneration(WhisperConfig(**SMALL, num_mel_bins=8, pad_token_id=0)),
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["calibrate", "record"])
def test_embeddings_of_positions_are_refused_by_name_and_the_others_can_be_had(name, how):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    before = fingerprint(model)
    recipe = QuantizationModifier(scheme=SCHEME, targets=["Embedding"])
    with pytest.raises(ValueError, match=r"embed_positions: a \w+ is called with more than its input \(.*position_ids"):
        if how == "calibrate": calibrate(model, None, recipe, progress=False)
        else: record(model, None, scheme=recipe, base_names="weight", progress=False)
    assert differences(before, fingerprint(model)) == []


def test_opt_without_its_positions_is_calibrated():
    model = opt().eval()
    recipe = QuantizationModifier(scheme=SCHEME, targets=["Embedding"], ignore=["re:.*embed_positions"])
    calibrate(model, make_batches(1), recipe, progress=False)
    model(**make_batches(1)[0])
    assert model.model.decoder.embed_tokens.weight_scale.shape == (128, 1)
