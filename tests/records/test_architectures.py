"""Records of models of every kind: encoders, decoders, images, plain modules, offloaded, tied."""
import pytest
import torch
from helpers import CONFIGS, differences, fingerprint, make_batches, make_model, offload
from torch.nn import Linear, Sequential
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from qcal_nb.lifecycle import QuantizationMixin
from qcal_nb.pipelines import calibration_context
from qcal_nb.stats import measure
from qcal_nb.records import record, unequal_parts
from tests.records.samples import OPTIONS, QUIET, exact


def encoder_decoders():
    small = dict(
        vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=0,
        eos_token_id=1, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    ids = make_batches(2)
    both = [dict(b, decoder_input_ids=b["input_ids"].flip(1)) for b in ids]
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=128, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    yield "t5", t5, both
    yield "bart", BartForConditionalGeneration(BartConfig(**small, max_position_embeddings=32)), both
    sounds = [dict(input_features=torch.randn(2, 8, 16), decoder_input_ids=b["input_ids"][:, :8]) for b in ids]
    yield "whisper", WhisperForConditionalGeneration(
        WhisperConfig(**small, num_mel_bins=8, max_source_positions=8, max_target_positions=16)
    ), sounds


def test_encoder_decoders(tiny):
    "They are recorded; a mask, or the token at a place, would mean two things at once: refused, and not told."
    for name, model, data in encoder_decoders():
        model.eval()
        before = fingerprint(model)
        run = record(model, data, tokenizer=tiny[1], base_names=["input", "output", "lm_head_output"], **QUIET)
        assert run.batches == 2 and all(s.count for s in run.tensors.values()), name
        assert any("decoder" in m for m, _ in run.tensors) and not run.has_text
        with pytest.raises(ValueError, match=f"mask: {type(model).__name__} reads two sequences"):
            record(model, data, mask=[5], **QUIET)
        assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"gpt2"}))
def test_any_language_model(name):
    "Inputs of every Linear but the head are what plain hooks see."
    model, data, caught = make_model(name), make_batches(2), {}
    if name != "mixtral":
        def catch(n): return lambda _, args: caught.setdefault(n, []).append(args[0].detach().clone())
        handles = [
            m.register_forward_pre_hook(catch(n))
            for n, m in model.named_modules() if isinstance(m, Linear) and n != "lm_head"
        ]
        with calibration_context(model):
            for b in data: model(**b)
        for h in handles: h.remove()
    run = record(model, data, observers=["minmax"], **QUIET)
    assert run.batches == 2 and run.tokens == 64 and len(run) > 10
    for n, seen in caught.items():
        # OPT flattens; positions are those of the tokens all the same
        leading = (2, 16) if len(seen[0]) == 32 else None
        assert exact(run[n, "input"]) == exact(
            measure(seen[0], 0, leading=leading) | measure(seen[1], 1, leading=leading)
        ), n
    assert {m for m, b in run.tensors if b == "input"} >= set(caught)


def test_images_and_plain_modules():
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )).eval()
    run = record(vit, [dict(pixel_values=torch.randn(2, 3, 16, 16)) for _ in range(2)], **QUIET)
    assert run.batches == 2 and run.tokens == 4 and any(s.shapes == ((2, 17, 32),) for s in run.tensors.values())
    plain = Sequential(Linear(4, 8), torch.nn.ReLU(), Linear(8, 2))
    run = record(plain, [torch.randn(3, 4), torch.randn(5, 4)], base_names=["input", "weight", "output"], **QUIET)
    assert run["0", "input"].shapes == ((3, 4), (5, 4)) and run["2", "output"].count == 16
    assert run["0", "input"].timeline.points.keys() == {0, 1}
    assert run["2", "input"].min == 0 and run["0", "weight"].numel == 32


def test_a_model_with_nothing_to_record_is_refused():
    for model in (Sequential(torch.nn.ReLU()), make_model("gpt2")):
        before = fingerprint(model)
        with pytest.raises(ValueError, match=f"there is nothing to record: {type(model).__name__} has no Linear"):
            record(model, make_batches(1), **QUIET)
        assert differences(before, fingerprint(model)) == []


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model(kind, tmp_path):
    here = record(make_model("llama_gqa"), make_batches(2), **OPTIONS)
    model = offload(make_model("llama_gqa"), kind, tmp_path/"weights")
    before = {n: id(m._parameters) for n, m in model.named_modules()}
    there = record(model, make_batches(2), **OPTIONS)
    assert unequal_parts(here, there) == []
    assert {n: id(m._parameters) for n, m in model.named_modules()} == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_tied_embeddings_as_a_target():
    model = make_model("llama_tied")
    before = fingerprint(model)
    scheme = QuantizationMixin(
        config_groups={"g": dict(targets=["Linear", "Embedding"], weights=dict(num_bits=8, strategy="channel"))}
    )
    run = record(model, make_batches(1), scheme=scheme, base_names=["input", "weight", "output"], **QUIET)
    assert ("model.embed_tokens", "weight") in run.tensors and ("model.embed_tokens", "input") not in run.tensors
    weight = model.model.embed_tokens.weight.detach()
    assert exact(run["model.embed_tokens", "weight"]) == exact(measure(weight, None))
    assert run["model.embed_tokens", "weight"].batches == 0
    assert run["lm_head", "weight"].histogram == run["model.embed_tokens", "weight"].histogram
    assert differences(before, fingerprint(model)) == []


def test_weights_alone_need_no_data():
    model = make_model("llama_gqa")
    run = record(model, None, base_names="weight", observers=["mse", "percentile"], **QUIET)
    assert run.batches == run.tokens == 0 and len(run) == 14 and all(c.scale is not None for c in run.results.values())
    assert all(s.calls == 1 and s.batches == 0 and all(e.batch == -1 for e in s.top) for s in run.tensors.values())


WRONG = {
    "model": (dict(model="gpt2"), TypeError, "model must be a torch.nn.Module, got str"),
    "data none": (dict(data=None), TypeError, "data must be an iterable .* got NoneType"),
    "data number": (dict(data=7), TypeError, "data must be an iterable .* got int"),
    "data empty": (dict(data=[]), ValueError, "data is empty"),
    "data text": (dict(data=["a text"]), ValueError, "tokenizer=None; pass the model's tokenizer"),
    "data strange": (dict(data=[object()]), TypeError, "data holds a object"),
    "scheme name": (dict(scheme="FP9"), ValueError, "scheme='FP9' is not a preset"),
    "scheme number": (dict(scheme=0), ValueError, "scheme=0 must be a preset"),
    "scheme empty": (dict(scheme=""), ValueError, "scheme='' is not a preset"),
    "scheme that does not fit": (dict(scheme="W4A16"), ValueError, "group_size is 128"),
    "observers name": (dict(observers="minmacks"), ValueError, "observer='minmacks' is unknown; registered are"),
    "observers number": (dict(observers=5), TypeError, "observers=5 must be names"),
    "observers of numbers": (dict(observers=[5]), TypeError, "observers must hold names, or pairs"),
    "observers pair without list": (
        dict(observers=("percentile", {"percentile": 99.9})), TypeError, "observers must hold names, or pairs"
    ),
    "observers argument": (
        dict(observers=[("minmax", {"speed": 1})]), ValueError, "speed=1 is unknown to MinMaxObserver"
    ),
    "observers value": (
        dict(observers=[("minmax", {"averaging_constant": 0})]), ValueError, "averaging_constant=0 must be a number in"
    ),
    "observers path": (dict(observers=["evil.py:Run"]), ValueError, "looked up by name and never imported"),
    "tokenizer": (dict(tokenizer="gpt2"), TypeError, "tokenizer must be the model's tokenizer .* got str"),
    "tokenizer class": (dict(tokenizer=dict), TypeError, "tokenizer must be the model's tokenizer"),
    "mask": (dict(mask="bos"), TypeError, "mask must be token ids to leave out"),
    "batch_size": (dict(batch_size=0), ValueError, "batch_size=0 must be an int of at least 1"),
    "batch_size float": (dict(batch_size=1.5), ValueError, "batch_size=1.5 must be an int"),
    "max_length": (dict(max_length=-1), ValueError, "max_length=-1 must be an int of at least 1"),
    "base_names": (
        dict(base_names="wieght"), ValueError, "base_names=\\('wieght',\\) must be some of 'input', 'weight'"
    ),
    "base_names empty": (dict(base_names=[]), ValueError, "base_names=\\(\\) must be some of"),
    "base_names number": (dict(base_names=5), TypeError, "base_names=5 must be some of"),
    "base_names nested": (dict(base_names=[["input"]]), (TypeError, ValueError), "base_names=.* must be some of"),
    "nonfinite": (
        dict(nonfinite="ignore"),
        ValueError,
        "nonfinite='ignore' is unknown; it must be one of 'raise', 'skip', 'record'",
    ),
    "nonfinite number": (dict(nonfinite=5), ValueError, "nonfinite=5 is unknown"),
    "indices number": (dict(batch_indices=5), TypeError, "batch_indices=5 must be ints, one for each batch"),
    "indices negative": (dict(batch_indices=[-1]), ValueError, "batch_indices holds -1"),
    "indices float": (dict(batch_indices=[0.0]), ValueError, "batch_indices holds 0.0"),
    "indices bool": (dict(batch_indices=[True]), ValueError, "batch_indices holds True"),
    "indices twice": (dict(batch_indices=[1, 1]), ValueError, "batch_indices holds an index twice"),
    "indices too many": (
        dict(batch_indices=[0, 1, 2]), ValueError, "batch_indices has 3 indices, but data gave 1 batches"
    ),
    "keep_text": (dict(keep_text="no"), TypeError, "keep_text='no' must be True or False"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_named(case):
    model = make_model("llama_gqa")
    before = fingerprint(model)
    wrong, error, words = WRONG[case]
    call = dict(model=model, data=make_batches(1), **QUIET) | wrong
    with pytest.raises(error, match=words): record(call.pop("model"), call.pop("data"), **call)
    assert differences(before, fingerprint(model)) == []
