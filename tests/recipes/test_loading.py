"""What other programs will do with a checkpoint is known before it is written, and before any text runs."""
import warnings

import pytest
import torch
import transformers
from helpers import differences, fingerprint, make_batches, make_model
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from qcal_nb.cli import main
from qcal_nb.lifecycle import QuantizationModifier
from qcal_nb.pipelines import calibrate
from qcal_nb.recipes import check_savable, override, save_quantized, to_config

WIDE = dict(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
T5 = dict(vocab_size=64, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
MODELS = dict(
    T5=("T5ForConditionalGeneration", T5), MT5=("MT5ForConditionalGeneration", T5),
    ModernBert=("ModernBertForMaskedLM", WIDE | IDS),
    Mamba2=("Mamba2ForCausalLM", dict(vocab_size=64, hidden_size=64, state_size=4, num_hidden_layers=1, num_heads=8,
                                      head_dim=16, n_groups=1)),
    Falcon=("FalconForCausalLM", dict(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)),
    Bert=("BertForMaskedLM", WIDE), Llama=("LlamaForCausalLM", WIDE | dict(num_key_value_heads=2)),
    Llama4Text=("Llama4ForCausalLM", WIDE | dict(intermediate_size_mlp=64, num_key_value_heads=2, head_dim=16,
                                                 num_local_experts=2, attn_temperature_tuning=False)),
)
W4 = dict(scheme=("W4A16", dict(group_size=32)), ignore=["lm_head"])


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    cls, options = MODELS[name]
    return getattr(transformers, cls)(getattr(transformers, f"{name}Config")(**options)).eval()


def called_with(model: torch.nn.Module, n: int) -> list[dict]:
    batches = make_batches(n, 64, (1, 8))
    return [dict(b, decoder_input_ids=b["input_ids"]) if model.config.is_encoder_decoder else b for b in batches]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad(): return model(**called_with(model, 1)[0]).logits


def warned_of(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if "transformers" in str(w.message)]


@pytest.mark.parametrize("scheme", ["W4", "FP8"])
@pytest.mark.parametrize("name", MODELS)
def test_the_warning_is_true_and_comes_before_the_data(name, scheme, tmp_path):
    model = make(name)
    modifier = QuantizationModifier(**W4) if scheme == "W4" else QuantizationModifier(scheme="FP8", ignore=["lm_head"])
    before = fingerprint(model)
    said = warned_of(lambda: check_savable(model, modifier))
    assert differences(before, fingerprint(model)) == []
    calibrate(model, called_with(model, 2), modifier, progress=False)
    assert warned_of(lambda: save_quantized(model, tmp_path/"x")) == said
    if not said:
        assert torch.equal(logits(type(model).from_pretrained(tmp_path/"x").eval()), logits(model))
        return
    assert len(said) == 1 and "cannot load packed weights" in said[0]
    with pytest.raises(AttributeError, match="weight"): type(model).from_pretrained(tmp_path/"x")


def test_modules_that_a_loader_would_match_are_ignored():
    "FalconLinears are quantized, the head is a Linear: compressed-tensors' own list lacks it."
    model = make("Falcon")
    calibrate(model, called_with(model, 1), QuantizationModifier(scheme="FP8", ignore=["lm_head"]), progress=False)
    assert to_config(model)["ignore"] == ["lm_head"]


DEEPSEEK = WIDE | dict(
    num_hidden_layers=2, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16,
    qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
    moe_intermediate_size=64, first_k_dense_replace=1,
)


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules"])
def test_layers_that_the_config_promises(field):
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)).eval()
    model.config.num_nextn_predict_layers = 0
    modifier = QuantizationModifier(scheme="FP8", ignore=["lm_head", "re:.*experts.*"])
    def promises(): return [w for w in warned_of(lambda: check_savable(model, modifier)) if "promises" in w]
    assert promises() == []
    setattr(model.config, field, 1)
    assert len(promises()) == 1 and f"({field}=1)" in promises()[0]


def test_settings_that_contradict_each_other():
    model = make("Llama")
    model.generation_config.temperature = 0.7      # and do_sample is False
    before = fingerprint(model)
    with pytest.raises(ValueError, match="model.generation_config contradicts itself.*temperature"):
        check_savable(model, QuantizationModifier(scheme="FP8", ignore=["lm_head"]))
    assert differences(before, fingerprint(model)) == []


MIXED = [r"re:.*experts[.]0[.].*"]


def test_experts_in_several_ways_are_refused_before_the_data():
    model = make_model("mixtral")
    modifier = QuantizationModifier(scheme="FP8", ignore=["lm_head", *MIXED])
    before = fingerprint(model)
    with pytest.raises(ValueError, match="experts are quantized in 2 ways|are quantized in 2 ways"):
        check_savable(model, modifier)
    assert differences(before, fingerprint(model)) == []


def test_experts_whose_observers_differ_are_stored_in_one_way(tmp_path):
    "As *Use best* leaves them: which observer found a scale does not matter to those who load it."
    model = make_model("mixtral")
    base = QuantizationModifier(scheme="INT8_STATIC", ignore=["lm_head"])
    one = "model.layers.0.mlp.experts.0.up_proj"
    modifier = override(base, {one: dict(input="percentile", weight="memoryless_mse")})
    check_savable(model, modifier)
    calibrate(model, make_batches(2), modifier, progress=False)
    assert (save_quantized(model, tmp_path/"x")/"model.safetensors").exists()


def test_the_command_line_says_it_before_a_text_runs(tmp_path, monkeypatch, capsys):
    model = make("Llama")
    model.generation_config.temperature = 0.7
    from qcal_nb.models import load_tiny_llama
    tokenizer = load_tiny_llama()[1]
    monkeypatch.setattr("qcal_nb.cli.inputs.load_model", lambda name: (model, tokenizer))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    texts = tmp_path/"texts.txt"
    texts.write_text("one text")
    assert main(["calibrate", "tiny", "--data", str(texts), "--out", str(tmp_path/"out"), "--checkpoint"]) == 1
    assert "generation_config contradicts itself" in capsys.readouterr().err and calls == []


ASYMMETRIC = ("W4A16_ASYM", dict(group_size=32))
EMBEDDED = {"g": dict(targets=["Linear", "Embedding"], weights=dict(num_bits=8, strategy="channel"))}
FORMS = dict(
    packed=W4, asymmetric=dict(scheme=ASYMMETRIC), embedded=dict(config_groups=EMBEDDED),
    static=dict(scheme="INT8_STATIC"),
    ints=dict(scheme="W8A8"), floats=dict(scheme="FP8"), dynamic=dict(scheme="FP8_DYNAMIC"),
    cache=dict(kv_cache_scheme=dict(num_bits=8, type="float", strategy="tensor", dynamic=False, symmetric=True)),
)


def mixture(name: str) -> torch.nn.Module:
    if name == "mixtral": return make_model("mixtral")
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK | dict(moe_intermediate_size=64))).eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_what_is_said_of_mixtures_is_true(name, form, tmp_path):
    "Not loaded, loaded with other logits, or nothing is said and the logits are the same."
    model = mixture(name)
    modifier = QuantizationModifier(**dict(ignore=["lm_head"]) | FORMS[form])
    said = warned_of(lambda: check_savable(model, modifier))
    calibrate(model, make_batches(2, 64, (1, 8)), modifier, progress=False)
    assert warned_of(lambda: save_quantized(model, tmp_path/"x")) == said
    if any("this checkpoint is for programs that" in words for words in said):
        with pytest.raises((RuntimeError, IndexError)): logits(type(model).from_pretrained(tmp_path/"x").eval())
        return
    loaded = logits(type(model).from_pretrained(tmp_path/"x").eval())
    assert any("logits will differ" in words for words in said) != torch.equal(loaded, logits(model))


def test_llama4_with_nothing_but_its_cache_quantized_is_saved(tmp_path):
    model = make("Llama4Text")
    calibrate(model, called_with(model, 1), QuantizationModifier(**FORMS["cache"]), progress=False)
    assert (save_quantized(model, tmp_path/"x")/"model.safetensors").exists()


@pytest.mark.parametrize("name, recipe", [
    ("gpt2", dict(scheme="FP8", ignore=["lm_head"])), ("bert", dict(scheme="FP8", targets=["nope"]))
])
def test_a_recipe_that_quantizes_nothing_cannot_be_saved(name, recipe):
    with pytest.raises(ValueError, match="this recipe quantizes nothing of this model"):
        check_savable(make_model(name), QuantizationModifier(**recipe))


@pytest.mark.parametrize("wrong", [None, "FP8"])
def test_what_is_no_recipe(wrong):
    with pytest.raises(TypeError, match="modifier must be a QuantizationModifier"): check_savable(make("Bert"), wrong)


BART = dict(vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64)


@pytest.mark.parametrize("name, scheme, fails", [
    ("T5", "FP8", True), ("MT5", "FP8_DYNAMIC", True), ("T5", "INT8_STATIC", False), ("Bart", "FP8", False)
])
def test_a_head_that_is_tied_again_when_it_is_loaded(name, scheme, fails, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "Bart", ("BartForConditionalGeneration", BART))
    model = make(name)
    modifier = QuantizationModifier(scheme=scheme)      # the head as well
    said = warned_of(lambda: check_savable(model, modifier))
    calibrate(model, called_with(model, 2), modifier, progress=False)
    assert warned_of(lambda: save_quantized(model, tmp_path/"x")) == said
    if not fails:
        loaded = type(model).from_pretrained(tmp_path/"x").eval()
        assert said == [] and torch.equal(logits(loaded), logits(model))
        return
    assert len(said) == 1 and "Add 'lm_head' to `ignore`" in said[0]
    with pytest.raises(RuntimeError, match="Float8"): type(model).from_pretrained(tmp_path/"x")
